"""MMMU: college questions about one image or several, multiple choice and open."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval.spec import SourceSpec
from eval.task import EncodedImage
from eval.tasks.formats.choices import choice_item, letters
from eval.tasks.formats.files import Item, item
from eval.tasks.formats.interleaved import MARK, without_first_mark
from eval.tasks.formats.rows import Row, parquet_rows
from flamingo.errors import UserError


def mmmu(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Yield a folder with the hub's parquet files (SUBJECT/SPLIT-*.parquet); kind is split and subject.

    The images come where the text names them (`eval.tasks.formats.interleaved`). An open question has no choices and
    is generated, whatever the task's `output`. `only: {question_type: multiple-choice}` (or open) takes one kind.
    """
    files = sorted(path.glob(f"**/{source.split or 'validation'}-*.parquet"))
    if not files:
        raise UserError(f"{path} holds no {source.split or 'validation'}-*.parquet")
    wanted = source.only.get("question_type")
    for file in files:
        for row in parquet_rows(file):
            if wanted is None or row.fields.get("question_type") == wanted:
                yield _item(row)


def _item(row: Row) -> Item:
    name = row.name("id")
    images = [_image(row, f"image_{n}") for n in range(1, 8) if row.fields.get(f"image_{n}") is not None]
    asked, kind = without_first_mark(row.text("question")), name.rsplit("_", 1)[0]
    more: dict[str, Any] = {"images": images}
    first = images[0] if images else None
    if row.text("question_type") != "multiple-choice":
        return item(row, name, first, asked, _listed(row.text("answer")), kind, open=True, **more)
    options, answer = _listed(row.text("options")), row.text("answer")
    correct = letters(options).index(answer) if answer in letters(options) else answer
    plain = [MARK.sub(lambda mark: f"image {mark[1]}" if len(images) > 1 else "the image", o) for o in options]
    return choice_item(row, name, plain, correct, asked, image=first, kind=kind, shown=options, **more)


def _image(row: Row, key: str) -> EncodedImage:
    data = row.row(key).get("bytes")
    if not isinstance(data, bytes):
        raise row.wrong(f"{key}.bytes", data, "an image file's bytes")
    return EncodedImage((data,), (f"{row.path}: {row.where}, {key}",))


def _listed(text: str) -> list[str]:
    """Parse a string that looks like a list of strings, as the hub's files have them; any other is the only entry."""
    try:
        listed = ast.literal_eval(text) if text.startswith("[") else text
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        listed = text
    return [str(part) for part in listed] if isinstance(listed, list) else [text]
