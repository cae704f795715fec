"""Looks up bytes by name in files too large for memory: an SQLite file, made once, says where each image lies.

For images by URL, `--images` is one or more of: img2dataset's tars or a folder of them (the URL is in each JSON; the
keys are positions in some list and identify nothing), or a map: CSV, TSV or JSONL with `url` and `path` (below the
map's folder).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from data.prepare.images import ImageFolder
from data.prepare.inputs import input_files
from data.prepare.tars import tar_samples
from data.prepare.units import Dropped, Tally
from data.prepare.web.address import same_address
from data.records import json_objects, table_rows
from data.shards.places import Place, RemotePath, fetched, is_store, place
from flamingo.errors import UserError
from flamingo.files import write_atomically

Entry = tuple[str, str, int, int]  # name, file, offset, size; offset -1: the whole file, its path below `root`


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=12).digest()


def build_lookup(path: Path, entries: Iterable[Entry], root: str = "", stamp: str = "") -> None:
    """Write the lookup. Of names that occur twice the first is kept."""
    write_atomically(path, lambda temporary: _fill(temporary, entries, root, stamp))


def _fill(path: Path, entries: Iterable[Entry], root: str, stamp: str) -> None:
    base = sqlite3.connect(path, isolation_level=None)
    try:
        base.execute("PRAGMA journal_mode=OFF")
        base.execute("PRAGMA synchronous=OFF")
        base.execute("CREATE TABLE files (id INTEGER PRIMARY KEY, path TEXT)")
        base.execute("CREATE TABLE locations (name BLOB PRIMARY KEY, file INT, offset INT, size INT) WITHOUT ROWID")
        base.execute("BEGIN")
        base.execute("INSERT INTO files VALUES (0, ?), (-1, ?)", (root, stamp))
        last, file_index = None, 0
        for name, file, offset, size in entries:
            if file != last:
                file_index += 1
                last = file
                base.execute("INSERT INTO files VALUES (?, ?)", (file_index, file))
            base.execute("INSERT OR IGNORE INTO locations VALUES (?, ?, ?, ?)", (_hash(name), file_index, offset, size))
        base.execute("COMMIT")
    finally:
        base.close()


class Lookup:
    """A reader of what `build_lookup` wrote."""

    def __init__(self, path: str | Path) -> None:
        self.base = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
        (root,) = self.base.execute("SELECT path FROM files WHERE id = 0").fetchone()
        self.folder = ImageFolder(root) if root else None
        self._open: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        row = self.base.execute("SELECT 1 FROM locations WHERE name = ?", (_hash(name),)).fetchone()
        return row is not None

    def read(self, name: str) -> bytes:
        """Return the bytes of a name. Raises Dropped when there is none."""
        row = self.base.execute(
            "SELECT path, offset, size FROM locations JOIN files ON id = file WHERE name = ?", (_hash(name),)
        ).fetchone()
        if row is None:
            raise Dropped("image is missing")
        path, offset, size = row
        if offset < 0:
            assert self.folder is not None
            return self.folder.read(path)
        if is_store(path):
            return RemotePath(path).read_bytes(offset, offset + size)
        if path not in self._open:
            if len(self._open) >= 64:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        data = os.pread(self._open[path], size, offset)
        if len(data) != size:
            raise UserError(f"{path} became shorter while it was read; start again when it is complete")
        return data

    def read_address(self, address: str) -> bytes:
        """Return the image at an address of the web, as browsers compare them. Raises Dropped when there is none."""
        return self.read(same_address(address))

    def close(self) -> None:
        """Close the base and all files."""
        self.base.close()
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def open_lookup(path: str) -> Lookup:
    """Return a lookup, opened once per process."""
    status = Path(path).stat()
    return _opened(path, status.st_ino, status.st_mtime_ns)


@lru_cache(maxsize=4)
def _opened(path: str, inode: int, changed: int) -> Lookup:
    return Lookup(path)


def build_url_lookup(path: Path, images: Sequence[str]) -> None:
    """Write the lookup of images by URL from the values of --images. Raises UserError."""
    maps = [place(item) for item in images if place(item).suffix in (".csv", ".tsv", ".jsonl")]
    if maps and len(images) > 1:
        raise UserError("--images takes one map (.csv, .tsv, .jsonl), or tars and folders of tars; not both")
    if maps and not maps[0].is_file():
        raise UserError(f"--images {maps[0]} does not exist; correct the path")
    files = [(str(maps[0]), maps[0])] if maps else input_files(images, (".tar",))
    stamp = json.dumps(
        [(str(file.resolve() if isinstance(file, Path) else file), file.stat().st_size) for _, file in files]
    )
    if path.exists() and _stamp_of(path) == stamp:
        return  # made before the run was interrupted
    if maps:
        with fetched(maps[0]) as copy:
            build_lookup(path, _map_entries(copy), str(maps[0].parent), stamp)
    else:
        build_lookup(path, _tar_entries(files), stamp=stamp)


def _stamp_of(path: Path) -> str:
    with contextlib.closing(sqlite3.connect(path)) as base:
        return str(base.execute("SELECT path FROM files WHERE id = -1").fetchone()[0])


def _tar_entries(files: Sequence[tuple[str, Place]]) -> Iterator[Entry]:
    for label, tar in files:
        for sample in tar_samples(tar, label, Tally()):
            images = sample.images()
            try:
                url = json.loads(sample.read("json"))["url"]
            except (KeyError, ValueError, TypeError, RecursionError):
                continue
            if images and isinstance(url, str):
                member = sample.members[images[0]]
                yield same_address(url), str(tar), member.offset, member.size


def _map_entries(path: Path) -> Iterator[Entry]:
    rows: Iterable[dict[str, Any]] = (
        (row for _, row in json_objects(path))
        if path.suffix == ".jsonl"
        else table_rows(path, ("url", "path"), "," if path.suffix == ".csv" else "\t")
    )
    for count, row in enumerate(rows, 1):
        url, name = row.get("url"), row.get("path")
        if not isinstance(url, str) or not isinstance(name, str):
            raise UserError(f"map {path} cannot be used: row {count} has no 'url' and 'path'; give it these columns")
        yield same_address(url), name, -1, -1
