"""Your own data: a CSV or JSONL table is a task in five lines of YAML.

Columns: image (a path relative to the table; empty for a question about none; in JSONL also a list of frames), answer
(several accepted ones separated by | or, in JSONL, a list; the first is the one shown), and if there are any question,
kind, id, label, rationale, group, and choices (separated by |, or a list). `source.fields` gives columns other names.
The task's question may name further columns as `{column}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data.records import table_rows
from eval.spec import SourceSpec
from eval.task import EncodedImage, StoredImage
from eval.tasks.formats.files import Item, read_files, read_jsonl
from flamingo.errors import UserError

FIELDS = ("question", "answer", "kind", "label", "rationale")


def read_csv_table(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Yield the rows of a CSV file with a header."""
    for index, row in enumerate(table_rows(path)):
        if index == 0:
            _check_columns(path, row, {"image": "image", "answer": "answer"} | source.fields)
        yield _item(path, index, row, source)


def read_jsonl_table(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Yield the objects of a file with one object per line."""
    for index, row in enumerate(read_jsonl(path)):
        needed = {field: source.fields.get(field, field) for field in ("image", "answer")}
        _check_columns(f"{path}: line {index + 1}", row, needed)
        yield _item(path, index, row, source)


def _check_columns(where: object, row: Mapping[str, Any], needed: Mapping[str, str]) -> None:
    """Raise UserError unless a row has the columns of all needed fields."""
    for field, column in needed.items():
        if column not in row:
            raise UserError(
                f"{where} has no column {column!r}; its columns are {', '.join(row)}: set source.fields.{field} to one "
                "of them"
            )


def _item(path: Path, index: int, row: Mapping[str, Any], source: SourceSpec) -> Item:
    facts = {field: row.get(source.fields.get(field, field)) for field in FIELDS}
    choices, answers = _several(row.get("choices")), _several(facts["answer"])
    if not any(answer.strip() for answer in answers):
        raise UserError(f"{path}: row {index + 1} has no answer; fill it in or remove the row")
    if choices and not set(answers) <= set(choices):
        raise UserError(f"{path}: row {index + 1} has the answer {answers[0]!r}, which is not among its choices")
    image = source.fields.get("image", "image")
    plain = {field: str(value or "") for field, value in facts.items()}
    return {
        **{key: plain[key] for key in ("question", "kind", "label", "rationale")},
        "id": str(row.get("id") or f"{path.stem}.{index}"),
        "image": _image(path, index, row[image]),
        "answers": answers,
        "choices": choices,
        "group": str(row.get("group") or ""),
        "values": {str(key): str(value) for key, value in row.items() if key not in (*FIELDS, image)},
        "text": None,
    }


def _several(cell: Any) -> list[str]:
    if isinstance(cell, list):
        return [str(part) for part in cell]
    return str(cell).split("|") if cell not in (None, "") else []


def _image(path: Path, index: int, cell: str | Sequence[str] | None) -> EncodedImage | None:
    names = [cell] if isinstance(cell, str) else list(cell or ())
    files = [path.parent / name for name in names if name]
    for file in files:
        if not file.is_file():
            raise UserError(f"{path}: row {index + 1} names the image {file}, which does not exist")
    return StoredImage(partial(read_files, *files)) if files else None
