"""Annotation files by entries and types: whatever is not as it should be is one sentence with file, entry and key.

Every reader of a data set takes its values from a `Row`, and only by type. So a null, a list where a text belongs or a
missing key is refused here, once, and never reaches a prompt or a score.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.records import is_array, json_objects, one_line, read_json, table_rows
from flamingo.errors import UserError

_LONGEST = 1000  # bits of a number: what is longer has no float and is not an id either


class Row:
    """One entry of an annotation file: its `fields`, the file's `path`, and `where` it is in it ("line 3").

    Raises:
        UserError: the entry is not an object; and by every method, for a value of another type.
    """

    def __init__(self, path: Path, where: str, content: Any) -> None:
        self.path, self.where = path, where
        if not isinstance(content, Mapping):
            raise self.fault(f"is {_shown(content)}, not an object; is this the published file?")
        self.fields: Mapping[str, Any] = content

    def fault(self, what: str) -> UserError:
        """Return the error that this entry does or has something."""
        return UserError(f"{self.path}: {self.where} {what}")

    def wrong(self, key: str, value: object, wanted: str) -> UserError:
        """Return the error that a value is of another type than `wanted`."""
        return self.fault(f"has {_shown(value)} as {key!r}, which must be {wanted}; correct or remove the entry")

    def get(self, key: str) -> Any:
        """Return a value of any type, but not null."""
        if key not in self.fields:
            has = ", ".join(map(str, list(self.fields)[:8]))
            raise self.fault(f"has no {key!r} (it has {has}); is this the published file?")
        value = self.fields[key]
        if value is None:
            raise self.wrong(key, None, "given")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text; a number counts as one. With a `default`, a missing or null value is that."""
        value = self.fields.get(key) if default is not None else self.get(key)
        return default if value is None and default is not None else self._text(key, value)

    def name(self, key: str) -> str:
        """Return a text (or number) that names something: an id, a file, a split. It is not blank."""
        value = self.text(key)
        if not value.strip() or "\0" in value:
            raise self.wrong(key, value, "a name")
        return value

    def texts(self, key: str) -> list[str]:
        """Return a list of texts, at least one."""
        listed = self._list(key)
        if not listed:
            raise self.wrong(key, listed, "a list of at least one text")
        return [self._text(f"{key}[{index}]", value) for index, value in enumerate(listed)]

    def number(self, key: str) -> float:
        """Return a finite number; in tables it is written as text."""
        return self._number(key, self.get(key))

    def numbers(self, key: str, count: int) -> list[float]:
        """Return a list of `count` finite numbers."""
        listed = self._list(key)
        if len(listed) != count:
            raise self.wrong(key, listed, f"a list of {count} numbers")
        return [self._number(f"{key}[{index}]", value) for index, value in enumerate(listed)]

    def integer(self, key: str) -> int:
        """Return a whole number."""
        value = self.number(key)
        if value != int(value):
            raise self.wrong(key, self.fields[key], "a whole number")
        return int(value)

    def row(self, key: str) -> Row:
        """Return an object inside this entry."""
        return Row(self.path, f"{self.where}, {key!r}", self.get(key))

    def rows(self, key: str) -> list[Row]:
        """Return a list of objects inside this entry, perhaps none."""
        return _rows(self.path, self._list(key), f"{self.where}, {key}" if self.where != WHOLE else key)

    def entries(self) -> Iterator[tuple[str, Row]]:
        """Yield (key, object) of an entry whose values are objects."""
        for key, value in self.fields.items():
            yield str(key), Row(self.path, f"entry {str(key)!r}", value)

    def _list(self, key: str) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, list):
            raise self.wrong(key, value, "a list")
        return value

    def _text(self, key: str, value: object) -> str:
        text = text_of(value)
        if text is None:
            raise self.wrong(key, value, "text")
        return text

    def _number(self, key: str, value: object) -> float:
        try:
            number = float(text_of(value) or "")
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self.wrong(key, value, "a number")
        return number


WHOLE = "the file"
PARQUET_ROWS = 64  # read at a time: their images are in them


def text_of(value: object) -> str | None:
    """Return a text or a number as text; None for anything else, true and false included."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    known = value.bit_length() <= _LONGEST if isinstance(value, int) else math.isfinite(value)
    return str(value) if known else None


def _shown(value: object) -> str:
    """Return a value in a few words for a message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = text_of(value)
    return type(value).__name__ if text is None else repr(text[:40])


def _rows(path: Path, listed: Iterable[Any], what: str) -> list[Row]:
    return [Row(path, f"{what} {number}", content) for number, content in enumerate(listed, 1)]


def whole(path: Path) -> Row:
    """Return the object that a JSON file holds."""
    return Row(path, WHOLE, read_json(path))


def listed_rows(path: Path, content: Any) -> list[Row]:
    """Return the objects of a file whose content is a list."""
    if not isinstance(content, list):
        raise UserError(f"{path} is {_shown(content)}, not a list; is this the published file?")
    return _rows(path, content, "item")


def json_rows(path: Path) -> list[Row]:
    """Return the objects of a JSON file that holds a list."""
    return listed_rows(path, read_json(path))


def json_lines(path: Path) -> Iterator[Row]:
    """Yield the objects of a file with one JSON object a line (or an array of them)."""
    what = ""
    for number, content in json_objects(path):
        if not what:
            with path.open("rb") as file:
                what = "item" if is_array(file.read(256)) else "line"
        yield Row(path, f"{what} {number}", content)


def csv_rows(path: Path, needed: Sequence[str] = (), header: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of a CSV table; `header` are the columns of one that does not name them itself."""
    for number, content in enumerate(table_rows(path, needed, header=header), 1):
        yield Row(path, f"row {number}", content)


def parquet_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a parquet file, of which few are in memory at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path} is parquet: pip install flamingo-vlm[tasks]") from None
    try:
        with parquet.ParquetFile(path) as table:
            contents = (content for batch in table.iter_batches(PARQUET_ROWS) for content in batch.to_pylist())
            for number, content in enumerate(contents, 1):
                yield Row(path, f"row {number}", content)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as parquet: {one_line(error)}") from None


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler of lists, dicts, strings and numbers, which refuses anything that would need an import."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def pickled_rows(path: Path) -> list[Row]:
    """Return the objects of a pickled list. Unpickling may run code, so only plain values are read."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file).load()
    except Exception as error:  # a damaged pickle raises exceptions of every kind
        raise UserError(f"{path} is not a pickle of plain values: {one_line(error)}") from None
    return listed_rows(path, content)
