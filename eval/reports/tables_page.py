"""A self-contained page of sentences, figures and tables, and the same tables as text: for rating and for judging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.tools.templates import render
from eval.reports.report_page import png_uri

TEMPLATE = Path(__file__).parent / "templates" / "tables.html.j2"


@dataclass(frozen=True)
class Table:
    """A table of texts; rows are as long as the head."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """Return it in columns for the terminal."""
        lines = [[*map(str, row)] for row in (self.head, *self.rows)]
        widths = [max(len(line[k]) for line in lines) for k in range(len(self.head))]
        return "\n".join(
            [self.title, *("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)]
        )


def tables_html(
    title: str, sentences: Sequence[str], notes: Sequence[str], figures: Sequence[bytes], tables: Sequence[Table]
) -> str:
    """Return the page. `figures` are PNGs; `notes` are what a reader must not miss."""
    uris = [png_uri(figure) for figure in figures]
    return render(TEMPLATE, title=title, sentences=sentences, notes=notes, figures=uris, tables=tables)
