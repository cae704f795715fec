"""MMMU: college questions about one image or several, multiple choice and open."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from eval.spec import SourceSpec
from eval.task import StoredImage
from eval.tasks.formats.choices import choice_item, letters
from eval.tasks.formats.files import Item, item, need
from eval.tasks.formats.interleaved import MARK, without_first_mark
from flamingo.errors import UserError


def mmmu(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Yield a folder with the hub's parquet files (SUBJECT/SPLIT-*.parquet); kind is split and subject.

    The images come where the text names them (`eval.tasks.formats.interleaved`). An open question has no choices and
    is generated, whatever the task's `output`. `only: {question_type: multiple-choice}` (or open) takes one kind.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("MMMU's files are parquet: pip install flamingo-vlm[tasks]") from None
    files = sorted(path.glob(f"**/{source.split or 'validation'}-*.parquet"))
    if not files:
        raise UserError(f"{path} holds no {source.split or 'validation'}-*.parquet")
    wanted = source.only.get("question_type")
    for file in files:
        for row in parquet.read_table(file).to_pylist():
            if wanted is None or row.get("question_type") == wanted:
                yield _item(file, row)


def _item(file: Path, row: dict[str, Any]) -> Item:
    name = str(need(row, "id", file))
    blobs = [row[f"image_{n}"]["bytes"] for n in range(1, 8) if row.get(f"image_{n}")]
    images = [StoredImage(partial(_bytes_of, blob)) for blob in blobs]
    asked, kind = without_first_mark(str(need(row, "question", file, name))), name.rsplit("_", 1)[0]
    more: dict[str, Any] = {"images": images}
    first = images[0] if images else None
    if need(row, "question_type", file, name) != "multiple-choice":
        answers = _listed(str(need(row, "answer", file, name)))
        return item(name, first, asked, answers, kind, open=True, **more)
    options, answer = [str(option) for option in _listed(str(need(row, "options", file, name)))], row.get("answer")
    correct = letters(options).index(str(answer)) if str(answer) in letters(options) else answer
    plain = [MARK.sub(lambda mark: f"image {mark[1]}" if len(images) > 1 else "the image", o) for o in options]
    return choice_item(file, name, plain, correct, asked, image=first, kind=kind, shown=options, **more)


def _listed(text: str) -> list[str]:
    """Parse a string that looks like a list of strings, as the hub's files have them; any other is the only entry."""
    try:
        listed = ast.literal_eval(text) if text.startswith("[") else text
    except (ValueError, SyntaxError):
        listed = text
    return [str(part) for part in listed] if isinstance(listed, list) else [text]


def _bytes_of(blob: bytes) -> tuple[bytes, ...]:
    return (blob,)
