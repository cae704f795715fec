"""Reads the files of the input: JSON lines, JSON arrays and tables, a unit at a time.

No file is loaded whole. A large one is cut into units at lines, items or rows; one pass finds where they begin.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from data.prepare.units import InputUnit
from data.records import is_array, one_line, parse_json
from data.remote.download import expand
from data.shards.places import Place, RemotePath, files_below, is_store, matches, place
from flamingo.errors import UserError

LFS = b"version https://git-lfs.github.com/spec/v1"
CHUNK = 64_000_000  # bytes of a text file in one unit
LONGEST_LINE = 1 << 28  # bytes; images in base64 are far shorter


def input_files(inputs: Sequence[str], suffixes: Sequence[str]) -> list[tuple[str, Place]]:
    """Return (label, path) of every input file, sorted by label: files, folders (searched whole) and patterns.

    They may be those of a store (s3://bucket/folder), whose patterns may have braces too.

    Raises UserError for an input that is not there, holds no file of these kinds, is a pipe or a device, which may
    never end and cannot be read twice, or is a Git-LFS pointer.
    """
    labels: dict[Place, str] = {}
    for item in inputs:
        path = Path(item)
        new: dict[Place, str]
        if is_store(item):
            new = _stored(item, suffixes)
        elif path.is_dir():
            inside = [
                file for file in path.rglob("*") if file.name.lower().endswith(tuple(suffixes)) and file.is_file()
            ]
            new = {file: file.relative_to(path).as_posix() for file in inside}
        elif "://" in item:
            raise UserError(
                f"input {item} is a URL; inputs are files, folders and those of a store (s3://bucket/folder): download "
                "it, and give its path"
            )
        elif any(c in item for c in "*?[") and not path.exists():
            new = {Path(file): Path(file).name for file in glob.glob(item)}  # noqa: PTH207 (may be absolute)
        elif path.exists():
            new = {path: path.name}
        else:
            raise UserError(f"input {item} does not exist; correct the path")
        if not new:
            raise UserError(f"input {item} holds no {' or '.join(suffixes)} file; correct the path")
        labels |= new
    for file in labels:
        if isinstance(file, Path) and not file.is_file():
            kind = "folder" if file.is_dir() else "pipe or a device"
            raise UserError(f"input {file} is a {kind}, not a file; write what it gives to a file, and give that path")
        if file.stat().st_size < 1024:
            refuse_pointer(file)
    return sorted(((label, path) for path, label in labels.items()), key=lambda item: (item[0], str(item[1])))


def _stored(item: str, suffixes: Sequence[str]) -> dict[Place, str]:
    """Return the label of every file of a store that an input means. Raises UserError for one that is not there."""
    found: dict[Place, str] = {}
    for url in expand(item):
        path = RemotePath(url.rstrip("/"))
        new: dict[Place, str]
        if path.is_file():
            new = {path: path.name}
        elif any(c in url for c in "*?["):
            new = {match: match.name for match in matches(url)}
        else:
            inside = files_below(path)
            if not inside:
                raise UserError(f"input {url} does not exist; correct the path")
            new = {
                RemotePath(f"{path}/{name}", size): name
                for name, size in inside.items()
                if name.lower().endswith(tuple(suffixes))
            }
        found |= new
    return found


def folder_files(item: str) -> dict[str, int] | None:
    """Return the name and bytes of every file in a folder and its folders; None for an input that is no folder."""
    path = place(item)
    if isinstance(path, Path):
        return files_below(path) if path.is_dir() else None
    return files_below(path) or None


def refuse_pointer(path: Place) -> None:
    """Raise UserError when a file is only a Git-LFS pointer."""
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise UserError(f"{path} is a Git-LFS pointer of some 130 bytes, not the file; fetch it with: git lfs pull")


def file_units(inputs: Sequence[str], suffixes: Sequence[str]) -> list[InputUnit]:
    """Return one unit per file."""
    return [InputUnit(label, str(path), size=path.stat().st_size) for label, path in input_files(inputs, suffixes)]


def line_units(inputs: Sequence[str], suffixes: Sequence[str], chunk: int = CHUNK) -> list[InputUnit]:
    """Return units of files of lines: compressed ones whole, others cut about every `chunk` bytes.

    A line belongs to the unit in which it begins.
    """
    units = []
    for unit in file_units(inputs, suffixes):
        whole = unit.label.lower().endswith((".zip", ".gz"))
        for begin in range(0, 1 if whole else max(unit.size, 1), chunk):
            end = unit.size if whole else min(begin + chunk, unit.size)
            units.append(InputUnit(unit.label, unit.path, begin, end, unit.size))
    return units


def json_lines(unit: InputUnit) -> Iterator[tuple[str, Any]]:
    """Yield (where, value) of each line of a unit; for a line that is not JSON, the value is the exception.

    Raises UserError when a compressed file is damaged.
    """
    try:
        for where, line in _lines(unit):
            if len(line) > LONGEST_LINE:
                yield where, ValueError(f"it is longer than {LONGEST_LINE} bytes")
            elif line.strip():
                try:
                    yield where, parse_json(line)
                except ValueError as error:
                    yield where, error
    except (zipfile.BadZipFile, EOFError, gzip.BadGzipFile, NotImplementedError) as error:
        raise UserError(f"{unit.path} is damaged or incomplete ({one_line(error)}); download it again") from None
    except OSError as error:
        raise UserError(f"{unit.path} cannot be read ({error.strerror or error})") from None


def _lines(unit: InputUnit) -> Iterator[tuple[str, bytes]]:
    if unit.label.lower().endswith(".zip"):
        with place(unit.path).open("rb") as packed, zipfile.ZipFile(packed) as archive:
            for name in archive.namelist():
                if not name.endswith("/"):
                    with archive.open(name) as member:
                        yield from ((f"{unit.label} line {n}", line) for n, line in enumerate(_all_lines(member), 1))
        return
    if unit.label.lower().endswith(".gz"):
        with place(unit.path).open("rb") as packed, gzip.open(packed, "rb") as lines:
            yield from ((f"{unit.label} line {n}", line) for n, line in enumerate(_all_lines(lines), 1))
        return
    with place(unit.path).open("rb") as file:
        if unit.begin:
            file.seek(unit.begin - 1)
            _line(file)  # the rest of a line that began in the previous unit
        while (at := file.tell()) < unit.end:
            yield f"{unit.label} byte {at}", _line(file)


def _line(file: IO[bytes] | gzip.GzipFile) -> bytes:
    """Return the next line; of one that is too long its beginning, still too long, and the rest is passed over."""
    line = rest = file.readline(LONGEST_LINE + 1)
    while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
        rest = file.readline(LONGEST_LINE + 1)
    return line


def _all_lines(file: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    return iter(lambda: _line(file), b"")


def json_spans(path: str | Place, inside: str | None = None) -> Iterator[tuple[str | None, int, int]]:
    """Yield (key, offset, size) of every item of a JSON array (key None) or object, without loading the file.

    `inside` names the member of the outer object whose items are read. Raises UserError, naming the byte, for other
    JSON.
    """
    with place(path).open("rb") as file:
        scanner = _Scanner(file, str(path))
        opening = scanner.take("[{")
        if inside is not None:
            while True:
                if scanner.peek() == "}":
                    raise UserError(f"{path} has no member {inside!r}; is this the right file?")
                key = scanner.value()[0]
                scanner.take(":")
                if key == inside:
                    opening = scanner.take("[{")
                    break
                scanner.value()
                if scanner.peek() != "}":
                    scanner.take(",")
        closing = "]" if opening == "[" else "}"
        while scanner.peek() != closing:
            key = None
            if opening == "{":
                key = str(scanner.value()[0]).encode("latin-1").decode("utf-8", "replace")
                scanner.take(":")
            _, offset, size = scanner.value()
            yield key, offset, size
            if scanner.peek() != closing:
                scanner.take(",")


class _Scanner:
    """A reader of one JSON value after another. It reads Latin-1, in which a character is a byte."""

    def __init__(self, file: io.BufferedReader, path: str) -> None:
        self.file, self.path = file, path
        self.text, self.at, self.base, self.ended = "", 0, 0, False
        self.decoder = json.JSONDecoder(strict=False)
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        self.base = file.tell()

    def _more(self) -> bool:
        """Read at least as much again as is held, so that a long value is not parsed many times."""
        if len(self.text) - self.at > LONGEST_LINE:
            raise UserError(
                f"{self.path} has a JSON value of more than {LONGEST_LINE} bytes at byte {self.base + self.at}; is "
                "this the right file?"
            )
        raw = self.file.read(max(1 << 20, len(self.text) - self.at))
        self.base += self.at
        self.text, self.at = self.text[self.at :] + raw.decode("latin-1"), 0
        return bool(raw)

    def peek(self) -> str:
        """Return the next character that is not white space."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if not self._more():
                raise UserError(f"{self.path} is truncated: its JSON does not end; download it again")

    def take(self, allowed: str) -> str:
        """Return the next character, which must be one of these."""
        if (character := self.peek()) not in allowed:
            raise UserError(
                f"{self.path} is not the expected JSON: {character!r} at byte {self.base + self.at}, "
                f"expected {' or '.join(allowed)}"
            )
        self.at += 1
        return character

    def value(self) -> tuple[Any, int, int]:
        """Return (value, its text in Latin-1; offset; size) of the next value."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or not self._more():  # a number could continue
                    break
            except (json.JSONDecodeError, RecursionError) as error:
                if not self._more():
                    raise UserError(
                        f"{self.path} has broken JSON at byte {self.base + self.at} ({one_line(error)})"
                    ) from None
        offset, size = self.base + self.at, end - self.at
        self.at = end
        return value, offset, size


def array_units(path: Place, label: str, items: int) -> list[InputUnit]:
    """Return units of `items` consecutive items of a JSON array; `begin` and `end` are bytes."""
    units: list[InputUnit] = []
    size, spans, first = path.stat().st_size, [(o, s) for _, o, s in json_spans(path)], 0
    for first in range(0, len(spans), items):
        last = spans[min(first + items, len(spans)) - 1]
        units.append(InputUnit(f"{label} from item {first}", str(path), spans[first][0], last[0] + last[1], size))
    return units


def array_items(unit: InputUnit) -> Iterator[tuple[str, Any]]:
    """Yield (where, value) of the items of a unit of a JSON array."""
    with place(unit.path).open("rb") as file:
        file.seek(unit.begin)
        raw = file.read(unit.end - unit.begin)
    try:
        values = parse_json(b"[" + raw + b"]")
    except ValueError as error:
        raise UserError(
            f"{unit.path} has broken JSON between bytes {unit.begin} and {unit.end} ({one_line(error)})"
        ) from None
    label, _, first = unit.label.rpartition(" from item ")
    for index, value in enumerate(values, int(first)):
        yield f"{label} item {index}", value


def record_units(path: Place, label: str, items: int) -> list[InputUnit]:
    """Return units of a file of JSON lines, or of one that holds an array, whatever its name says."""
    with path.open("rb") as file:
        head = file.read(4096)
    packed = label.lower().endswith((".gz", ".zip"))
    if not packed and (
        is_array(head) or (path.suffix.lower() == ".json" and head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{")
    ):
        return array_units(path, label, items)
    return line_units([str(path)], (path.suffix,))


def records(unit: InputUnit) -> Iterator[tuple[str, Any]]:
    """Yield (where, value) of a unit of `record_units`; for a line that is not JSON, the value is the exception."""
    return array_items(unit) if " from item " in unit.label else json_lines(unit)


def csv_rows(path: str | Place, begin: int, end: int | None, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (byte after it, row) of the rows that begin in [begin, end) of a UTF-8 table; rows may span lines."""
    with place(path).open("rb") as file:
        file.seek(begin)
        at = begin

        def lines() -> Iterator[str]:
            nonlocal at
            for raw in _all_lines(file):
                if len(raw) > LONGEST_LINE:
                    raise UserError(f"{path} is not a table: a line of more than {LONGEST_LINE} bytes at byte {at}")
                at += len(raw)
                yield raw.decode("utf-8-sig" if at == len(raw) else "utf-8")

        try:
            for row in csv.reader(lines(), delimiter=delimiter, strict=True):
                yield at, row
                if end is not None and at >= end:
                    return
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a UTF-8 table: error near byte {at} ({one_line(error)})") from None


def csv_units(path: Place, label: str, rows: int, delimiter: str) -> list[InputUnit]:
    """Return units of `rows` consecutive rows of a table, the header left out."""
    size, units, begin, count = path.stat().st_size, [], -1, 0
    for at, _ in csv_rows(path, 0, None, delimiter):
        if begin < 0:
            begin = at  # after the header
            continue
        count += 1
        if count % rows == 0 or at == size:
            units.append(InputUnit(f"{label} from row {count - (count - 1) % rows}", str(path), begin, at, size))
            begin = at
    return units


def folder_units(root: str, sizes: Mapping[str, int], each: int) -> list[InputUnit]:
    """Return units of `each` files of a folder, from the bytes of each; the `size` of a unit is that of its files."""
    units, names = [], sorted(sizes)
    for first in range(0, len(names), each):
        some = tuple(names[first : first + each])
        size = sum(sizes[name] for name in some)
        units.append(InputUnit(f"{some[0]} and {len(some) - 1} more", root, first, first + len(some), size, some))
    return units


def required(module: str, purpose: str, extra: str = "prepare") -> Any:
    """Import an optional package. Raises UserError, naming the extra, when it is not installed."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        name = module.split(".")[0]
        raise UserError(
            f"{purpose} needs the package {name}; install it with: pip install 'flamingo-vlm[{extra}]'"
        ) from None
