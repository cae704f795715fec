"""The index of a tar: the offset of every member, from one walk over the headers, saved as `{shard}.tar.idx`.

With the offsets known, any sample is one `pread` away, so training may use any order and resuming costs nothing.
Columns are mapped, not read: the processes of a machine share them. Samples are grouped as in `data.shards.samples`,
and what webdataset ignores is an error here: a truncated tar, a key that occurs again later in the tar, a suffix twice
in one sample. The index holds its tar's size and a digest of both ends, so it cannot go stale unnoticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.shards.samples import IMAGE, JSON, SORT, TEXT, samples_of
from data.shards.tar import walk
from flamingo.errors import UserError
from flamingo.files import write_atomically

MAGIC = b"TARIDX01"
VERSION = 3  # of indexes and catalogues
ENDS = 1 << 16  # bytes of each end of the tar that go into the digest
KINDS = ("interleaved", "pairs", "text")  # kinds of datasets
HEAD_BYTES = 4096  # a header is far smaller


@dataclass(slots=True)
class TarIndex:
    """The columns of an index. Sample `row` has the members `first[row] : first[row + 1]`.

    first (N+1,) int64; offset, size (M,) int64; kind (M,) uint8; number (M,) uint16, which image of its sample;
    images_per_row (N,) uint16; keys: all keys as UTF-8, key_end (N+1,) int64 where they end.
    """

    path: str
    tar_size: int
    digest: str
    first: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    key_end: NDArray[np.int64]
    number: NDArray[np.uint16]
    images_per_row: NDArray[np.uint16]
    kind: NDArray[np.uint8]
    keys: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.first) - 1

    def key(self, row: int) -> str:
        """Return the key of a sample."""
        return bytes(self.keys[self.key_end[row] : self.key_end[row + 1]]).decode("utf-8", "surrogateescape")

    def members(self, row: int) -> list[tuple[int, int, int, int]]:
        """Return (kind, image number, offset, size) of each member of a sample, in the order of the tar."""
        a, b = int(self.first[row]), int(self.first[row + 1])
        columns = (self.kind, self.number, self.offset, self.size)
        return list(zip(*(column[a:b].tolist() for column in columns), strict=True))

    def rows_with(self, kind: int) -> NDArray[np.bool_]:
        """Return which samples have a member of this kind, (N,) bool."""
        counts = np.concatenate([[0], np.cumsum(self.kind == kind)])
        return counts[self.first[1:]] > counts[self.first[:-1]]

    def usable(self, kind: str) -> NDArray[np.int64] | None:
        """Return the rows that a dataset of this kind (`KINDS`) can use, None when it is all of them."""
        texts = self.rows_with(JSON) | self.rows_with(TEXT)
        images = self.images_per_row > 0
        usable = {"interleaved": texts | images, "pairs": images, "text": texts}[kind]
        return None if usable.all() else np.flatnonzero(usable)

    def head(self) -> IndexHead:
        """Return what the order needs to know of this shard."""
        rows = {kind: self.usable(kind) for kind in KINDS}
        counts = {kind: len(self) if usable is None else len(usable) for kind, usable in rows.items()}
        return IndexHead(self.tar_size, self.digest, counts)

    def save(self, path: str | Path) -> None:
        """Write the index: magic, header length, JSON header, then the columns, widest first."""
        columns = {name: getattr(self, name) for name in COLUMNS}
        header = {"v": VERSION, "tar_size": self.tar_size, "digest": self.digest, "usable": self.head().usable}
        body = json.dumps(header | {"lengths": {name: len(column) for name, column in columns.items()}}).encode()
        body += b" " * (-(len(MAGIC) + 8 + len(body)) % 8)
        parts = [np.ascontiguousarray(column, dtype=COLUMNS[name]).tobytes() for name, column in columns.items()]
        write_atomically(Path(path), b"".join([MAGIC + len(body).to_bytes(8, "little") + body, *parts]), shared=True)


@dataclass(frozen=True, slots=True)
class IndexHead:
    """An index without its columns: the tar's size and digest, and how many samples each kind of dataset can use."""

    tar_size: int
    digest: str
    usable: dict[str, int]


COLUMNS: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("first", "offset", "size", "key_end"), np.dtype("<i8")),
    **dict.fromkeys(("number", "images_per_row"), np.dtype("<u2")),
    **dict.fromkeys(("kind", "keys"), np.dtype("u1")),
}


def index_path(tar: str | Path) -> Path:
    """Return the path of a tar's index."""
    return Path(f"{tar}.idx")


def tar_digest(path: str | Path) -> tuple[int, str]:
    """Return (size, digest of both ends) of a tar. Raises UserError when it is missing."""
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(ENDS)
            file.seek(max(0, size - ENDS))
            return size, hashlib.sha256(head + file.read()).hexdigest()
    except FileNotFoundError:
        raise UserError(f"shard {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"shard {path} is a folder, a tar was expected") from None


def build_index(path: str | Path) -> TarIndex:
    """Walk a tar and group its members into samples. Raises UserError as `walk`, and for duplicate keys or suffixes."""
    keys: dict[str, int] = {}
    first: list[int] = []
    rows: list[tuple[int, int, int, int]] = []
    for row, (key, members) in enumerate(samples_of(path)):
        if key in keys:
            raise UserError(
                f"shard {path}: key {key!r} appears twice (rows {keys[key]} and {row}); a key is the name up to its "
                f"first dot, and the members of a sample stand together: {SORT}"
            )
        suffixes = [member.suffix for member in members]
        if len(set(suffixes)) < len(suffixes):
            twice = next(member for k, member in enumerate(members) if member.suffix in suffixes[:k])
            name = next(member.name for member in walk(path) if member.offset == twice.offset)
            raise UserError(f"shard {path}: {name!r} appears twice in row {row}")
        keys[key] = row
        first.append(len(rows))
        rows += [(member.offset, member.size, member.kind, member.number) for member in members]
    return _to_index(path, list(keys), first, rows)


def _to_index(path: str | Path, keys: list[str], first: list[int], rows: list[tuple[int, int, int, int]]) -> TarIndex:
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    starts = np.array([*first, len(rows)], dtype=np.int64)
    running = np.concatenate([[0], np.cumsum(table[:, 2] == IMAGE)])
    size, digest = tar_digest(path)
    return TarIndex(
        path=str(path),
        tar_size=size,
        digest=digest,
        first=starts,
        offset=table[:, 0].copy(),
        size=table[:, 1].copy(),
        key_end=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        number=table[:, 3].astype(np.uint16),
        images_per_row=np.diff(running[starts]).astype(np.uint16),
        kind=table[:, 2].astype(np.uint8),
        keys=np.frombuffer(b"".join(encoded), dtype=np.uint8),
    )


def _damaged(path: Path, tar: str | Path, error: Exception) -> UserError:
    return UserError(f"index {path} is damaged ({error}); build it again: python -m data index {tar}")


def _header(raw: bytes, path: Path, tar: str | Path) -> tuple[dict[str, Any], int]:
    """Return (JSON header, where the columns begin) from the first bytes of an index.

    Raises ValueError when it is damaged, UserError when it has another version.
    """
    if raw[:8] != MAGIC:
        raise ValueError("wrong magic")
    at = 16 + int.from_bytes(raw[8:16], "little")
    if len(raw) < at:
        raise ValueError("too short")
    header = json.loads(raw[16:at])
    if header["v"] != VERSION:
        raise UserError(
            f"index {path} has version {header['v']}, this program reads version {VERSION}; build it again: "
            f"python -m data index {tar}"
        )
    return header, at


def read_head(tar: str | Path, sidecar: Path | None = None) -> IndexHead:
    """Return the head of a tar's index, from its first bytes. Raises UserError when it is damaged."""
    path = sidecar or index_path(tar)
    try:
        with path.open("rb") as file:
            header, _ = _header(file.read(HEAD_BYTES), path, tar)
        usable = {kind: int(header["usable"][kind]) for kind in KINDS}
        return IndexHead(int(header["tar_size"]), str(header["digest"]), usable)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, tar, error) from None


def load_index(tar: str | Path, sidecar: Path | None = None, *, local: str | Path = "", check: bool = True) -> TarIndex:
    """Map a tar's index. Raises UserError when it is damaged or does not belong to the tar as it is now.

    `local` is the file to compare it with when that is a copy; without `check` nothing is compared.
    """
    path = sidecar or index_path(tar)
    try:
        # A plain view: slicing a memmap object costs several times as much.
        raw = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        header, at = _header(raw[:HEAD_BYTES].tobytes(), path, tar)
        columns = {}
        for name, dtype in COLUMNS.items():
            stop = at + dtype.itemsize * header["lengths"][name]
            columns[name] = raw[at:stop].view(dtype)
            if len(columns[name]) != header["lengths"][name]:
                raise ValueError("too short")
            at = stop
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, tar, error) from None
    index = TarIndex(path=str(tar), tar_size=header["tar_size"], digest=header["digest"], **columns)
    if check:
        check_tar(index.path, index.tar_size, index.digest, local or tar)
    return index


def wrong_size(tar: str | Path, size: int, expected: int) -> UserError:
    """Return the error for a tar whose size is not the one in its index."""
    return UserError(
        f"shard {tar} has {size} bytes but its index was built for {expected}: the shard is truncated or was replaced; "
        f"fetch it again, or if it is intact: python -m data index {tar}"
    )


def check_tar(tar: str, size: int, digest: str, local: str | Path) -> None:
    """Raise UserError unless the tar (whose bytes are in `local`) is the one that was indexed."""
    actual, ends = tar_digest(local)
    if actual != size:
        raise wrong_size(tar, actual, size)
    if ends != digest:
        raise UserError(f"shard {tar} changed after its index was built; build it again: python -m data index {tar}")


def open_index(tar: str | Path) -> TarIndex:
    """Return the index of a tar: the one beside it, or one built now and saved there if the folder can be written."""
    if index_path(tar).exists():
        return load_index(tar)
    index = build_index(tar)
    with contextlib.suppress(OSError):
        index.save(index_path(tar))
    return index
