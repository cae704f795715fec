"""Reads JSON, JSON lines and tables (CSV, TSV), for preparing and for evaluation: one rule of what a line and a row is.

A line ends at a line feed and nowhere else: other separators (U+2028, U+0085, vertical tabs) are text. Every fault is
named by file and line.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flamingo.errors import UserError

HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that may be half of a surrogate pair
csv.field_size_limit(min(sys.maxsize, (1 << 31) - 1))  # cells of more than 131,072 characters are ordinary ones


def one_line(error: BaseException) -> str:
    """Return a library's error message on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def parse_json(raw: bytes) -> Any:
    """Return the value of a JSON text; half a surrogate pair in a string becomes a question mark.

    Raises ValueError for anything else, however deep it is nested.
    """
    try:
        value = json.loads(raw)
        return _whole(value) if HALF.search(raw) else value
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_whole(part) for part in value]
    if isinstance(value, dict):
        return {_whole(key): _whole(part) for key, part in value.items()}
    return value


def read_bytes(path: Path) -> bytes:
    """Return a text file as UTF-8 without its byte-order mark. Raises UserError when it is missing or not UTF-8."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    raw = path.read_bytes()
    try:
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):  # as Windows' editors write it
            return raw.decode("utf-16").encode()
        raw.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    return raw.removeprefix(b"\xef\xbb\xbf")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; a list where it holds several values, one a line.

    Raises UserError when it is missing or damaged.
    """
    raw = read_bytes(path)
    try:
        return parse_json(raw)
    except ValueError as error:
        lines = [line for line in raw.split(b"\n") if line.strip()]
        if len(lines) > 1 and lines[0].lstrip()[:1] == b"{" and lines[0].rstrip()[-1:] == b"}":
            return [value for _, value in _lines(path, raw)]
        raise UserError(f"{path} is not JSON: {one_line(error)}") from None


def json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, object) of a file with a JSON object a line, or (position, object) of one that holds an array.

    Both are counted from 1. Raises UserError for a line that is not an object.
    """
    raw = read_bytes(path)
    values: Iterator[tuple[int, Any]]
    if is_array(raw):
        values, what = enumerate(read_json(path), 1), "item"
    else:
        values, what = _lines(path, raw), "line"
    for position, value in values:
        if not isinstance(value, dict):
            raise UserError(f"{path}: {what} {position} is not a JSON object but a {type(value).__name__}")
        yield position, value


def is_array(head: bytes) -> bool:
    """Return whether a file that begins so holds one array, whatever it is called. Lines of arrays are not read."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _lines(path: Path, raw: bytes) -> Iterator[tuple[int, Any]]:
    for line_number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            try:
                yield line_number, parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}: line {line_number} is not JSON: {one_line(error)}") from None


def table_rows(
    path: Path, needed: Sequence[str] = (), delimiter: str = ",", header: Sequence[str] = ()
) -> Iterator[dict[str, str]]:
    """Yield the rows of a table with a header; `header` are the columns of one without.

    Raises UserError if a column of `needed` is missing, and, naming the line, for a row with more or fewer cells than
    the header and for a quote that is not closed.
    """
    lines = read_bytes(path).decode().split("\n")
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    begin = 1
    try:
        for row in reader:
            if row and not header:
                header = header_of(path, row, needed)
            elif row and len(row) != len(header):
                raise UserError(
                    f"{path}: line {begin} has {len(row)} cells and the header {len(header)}; put a cell that has a "
                    f"{'comma' if delimiter == ',' else 'tab'} in quotes"
                )
            elif row:
                yield dict(zip(header, row, strict=True))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}: the row of line {begin} cannot be read ({one_line(error)}); is a quote not closed?"
        ) from None


def header_of(path: object, row: Iterable[str], needed: Sequence[str] = ()) -> list[str]:
    """Return the columns of a table. Raises UserError if one of `needed` is missing, or a name occurs twice."""
    header = list(row)
    if missing := [name for name in needed if name not in header]:
        raise UserError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(header)}")
    if twice := [name for k, name in enumerate(header) if name in header[:k]]:
        raise UserError(f"{path} has two columns {twice[0]!r}; give one of them another name")
    return header
