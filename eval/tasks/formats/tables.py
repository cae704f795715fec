"""Your own data: a CSV or JSONL table is a task in five lines of YAML.

Columns: image (a path relative to the table, or to `source.images`; empty for a question about none; in JSONL also a
list of frames), answer (several accepted ones separated by | or, in JSONL, a list; the first is the one shown), and if
there are any question, kind, id, label, rationale, group, and choices (separated by |, or a list). `source.fields`
gives columns other names. The task's question may name further columns as `{column}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from eval.spec import SourceSpec
from eval.task import EncodedImage
from eval.tasks.formats.files import Item, location, stored
from eval.tasks.formats.rows import Row, csv_rows, json_lines
from flamingo.errors import UserError

FIELDS = ("question", "answer", "kind", "label", "rationale")


def read_csv_table(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Yield the rows of a CSV file with a header."""
    for index, row in enumerate(csv_rows(path)):
        if index == 0:
            _check_columns(path, row, {"image": "image", "answer": "answer"} | source.fields)
        yield _item(index, row, source)


def read_jsonl_table(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Yield the objects of a file with one object per line."""
    for index, row in enumerate(json_lines(path)):
        needed = {field: source.fields.get(field, field) for field in ("image", "answer")}
        _check_columns(f"{path}: {row.where}", row, needed)
        yield _item(index, row, source)


def _check_columns(where: object, row: Row, needed: Mapping[str, str]) -> None:
    """Raise UserError unless a row has the columns of all needed fields."""
    for field, column in needed.items():
        if column not in row.fields:
            raise UserError(
                f"{where} has no column {column!r}; its columns are {', '.join(row.fields)}: set source.fields.{field} "
                "to one of them"
            )


def _item(index: int, row: Row, source: SourceSpec) -> Item:
    columns = {field: source.fields.get(field, field) for field in FIELDS}
    image = source.fields.get("image", "image")
    choices, answers = _several(row, "choices"), _several(row, columns["answer"])
    if not any(answer.strip() for answer in answers):
        raise UserError(f"{row.path}: row {index + 1} has no answer; fill it in or remove the row")
    if choices and not set(answers) <= set(choices):
        raise UserError(f"{row.path}: row {index + 1} has the answer {answers[0]!r}, which is not among its choices")
    # A question is asked by every row or by none: a null among the others would be a prompt without one.
    question = row.text(columns["question"]) if columns["question"] in row.fields else ""
    return {
        "question": question,
        **{key: row.text(columns[key], "") for key in ("kind", "label", "rationale")},
        "id": row.text("id", "") or f"{row.path.stem}.{index}",
        "image": _image(index, row, image, source),
        "answers": answers,
        "choices": choices,
        "group": row.text("group", ""),
        "values": {
            str(key): "" if value is None else str(value)
            for key, value in row.fields.items()
            if key not in (*FIELDS, image) and not isinstance(value, list | dict)
        },
        "text": None,
    }


def _several(row: Row, key: str) -> list[str]:
    """Return the texts of a cell: those of a list, or those between |."""
    if isinstance(row.fields.get(key), list):
        return _listed(row, key)
    cell = row.text(key, "")
    return cell.split("|") if cell else []


def _listed(row: Row, key: str) -> list[str]:
    return row.texts(key) if row.fields[key] else []


def _image(index: int, row: Row, key: str, source: SourceSpec) -> EncodedImage | None:
    names = _listed(row, key) if isinstance(row.fields[key], list) else [row.text(key, "")]
    files = [location(source, name, row) for name in names if name]
    for file in files:
        if not file.is_file():
            raise UserError(f"{row.path}: row {index + 1} names the image {file}, which does not exist")
    return stored(*files) if files else None
