"""A rater's sheet, as a page that works without a network and as a table. Neither says which system answered."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.tools.templates import render
from eval.rating.axes import SIDES, Axis
from eval.rating.plan import Plan, Question
from eval.reports.gallery import data_uri
from eval.task import EncodedImage
from flamingo.files import write_atomically

TEMPLATE = Path(__file__).parent / "templates" / "sheet.html.j2"
MOST_SIDE = 768  # in pixels; a rater looks at an image longer than a reader of the gallery
COLUMNS = ("sheet", "rater", "item", "side", "question", "answer")
BOTH = "both"
"""The side of a table's row about both answers together."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_sheets(
    plan: Plan, questions: Mapping[str, Question], images: Mapping[str, EncodedImage], out: Path
) -> list[Path]:
    """Write `R1.html` and `R1.csv` for each rater into `out` and return the pages."""
    pages = []
    for rater in plan.sheets:
        page = out / f"{rater}.html"
        write_atomically(page, page_of(plan, rater, questions, images))
        write_atomically(out / f"{rater}.csv", table_of(plan, rater, questions))
        pages.append(page)
    return pages


def page_of(plan: Plan, rater: str, questions: Mapping[str, Question], images: Mapping[str, EncodedImage]) -> str:
    """Return the page: everything in it, images too."""
    items = []
    for name, order in plan.sheets[rater]:
        figures = []
        for sha256, text in questions[name].figures:
            image = images.get(sha256 or "")  # None without images, or where the text is all
            frames = () if image is None else image.frames
            figures.append({"images": [data_uri(frame, MOST_SIDE) for frame in frames], "text": text})
        answers = [questions[name].answers[system] for system in order]
        items.append({"item": name, "figures": figures, "answers": answers})
    axes = [{"axis": key, **_shown(axis)} for key, axis in plan.axes.items()]
    return render(TEMPLATE, sheet={"sheet": plan.sheet, "rater": rater, "sides": SIDES, "axes": axes, "items": items})


def _shown(axis: Axis) -> dict[str, Any]:
    return {"question": axis.question, "options": axis.choices, "compares": axis.compares}


def table_of(plan: Plan, rater: str, questions: Mapping[str, Question]) -> str:
    """Return the table: a row for each answer, and one for both where answers are compared; axes are empty columns."""
    alone = [key for key, axis in plan.axes.items() if not axis.compares]
    together = [key for key, axis in plan.axes.items() if axis.compares]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow([*COLUMNS, *(f"{key} [{' | '.join(plan.axes[key].choices)}]" for key in plan.axes)])
    for name, order in plan.sheets[rater]:
        question = " ".join(text for _, text in questions[name].figures)
        answers = [(SIDES[side], questions[name].answers[system]) for side, system in enumerate(order)]
        rows = [(side, text, alone) for side, text in answers if alone]
        rows += [(BOTH, "", together)] if together else []
        for side, text, asked in rows:
            cells = ["" if key in asked else "-" for key in plan.axes]
            writer.writerow([plan.sheet, rater, name, side, _cell(question), _cell(text), *cells])
    return "\ufeff" + file.getvalue()  # with the mark spreadsheets read it as UTF-8


def _cell(text: str) -> str:
    """Return a text that no spreadsheet runs as a formula."""
    return f"'{text}" if text.startswith(FORMULA) else text
