"""The index of a tar: the offset of every member, from one walk over the headers, saved as `{shard}.tar.idx`.

With the offsets known, any sample is one `pread` away, so training may use any order and resuming costs nothing.
Columns are mapped, not read: the processes of a machine share them. Samples are grouped as in `data.shards.samples`,
and what webdataset ignores is an error here: a truncated tar, a key that occurs again later in the tar, a suffix twice
in one sample.

An index holds its tar's size and two digests of it: of all bytes, which is the tar's identity wherever it lies, and of
some, which is cheap enough to be compared whenever a process first reads the tar. It holds checksums of its own header
and columns too. One that is damaged is made again from its tar; numbers that cannot be are never used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.errors import warn
from data.records import parse_json
from data.shards.samples import IMAGE, JSON, SORT, TEXT, samples_of
from data.shards.tar import walk
from flamingo.errors import UserError
from flamingo.files import write_atomically

MAGIC = b"TARIDX01"
VERSION = 4  # of indexes and catalogues
ENDS = 1 << 16  # bytes of each end of the tar that are sampled,
PIECES, PIECE = 14, 1 << 12  # and pieces between them
SUM = 16  # bytes of the checksum behind the header
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
    sampled: str
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
        return IndexHead(self.tar_size, self.digest, self.sampled, counts)

    def save(self, path: str | Path) -> None:
        """Write the index: magic, header length, JSON header, its checksum, then the columns, widest first."""
        columns = {name: getattr(self, name) for name in COLUMNS}
        parts = [np.ascontiguousarray(column, dtype=COLUMNS[name]).tobytes() for name, column in columns.items()]
        rows = b"".join(parts)
        header = {"v": VERSION, "tar_size": self.tar_size, "digest": self.digest, "sampled": self.sampled}
        header |= {"columns": xxhash.xxh3_128_hexdigest(rows), "usable": self.head().usable}
        body = json.dumps(header | {"lengths": {name: len(column) for name, column in columns.items()}}).encode()
        body += b" " * (-(len(MAGIC) + 8 + len(body)) % 8)
        head = MAGIC + len(body).to_bytes(8, "little") + body
        write_atomically(Path(path), head + xxhash.xxh3_128_digest(head) + rows, shared=True)


@dataclass(frozen=True, slots=True)
class IndexHead:
    """An index without its columns: the tar's size and digests, and how many samples each kind of dataset can use."""

    tar_size: int
    digest: str
    sampled: str
    usable: dict[str, int]


class DamagedIndexError(UserError):
    """An index whose bytes are not those that were written."""


COLUMNS: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("first", "offset", "size", "key_end"), np.dtype("<i8")),
    **dict.fromkeys(("number", "images_per_row"), np.dtype("<u2")),
    **dict.fromkeys(("kind", "keys"), np.dtype("u1")),
}


def index_path(tar: str | Path) -> Path:
    """Return the path of a tar's index."""
    return Path(f"{tar}.idx")


def sampled_digest(path: str | Path) -> tuple[int, str]:
    """Return (size, digest of both ends and of pieces between them, and of the size) of a tar.

    Raises OSError when it cannot be read.
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        parts = [(0, ENDS), *((size * k // (PIECES + 1), PIECE) for k in range(1, PIECES + 1)), (size - ENDS, ENDS)]
        if size <= sum(length for _, length in parts):
            parts = [(0, size)]
        digest = xxhash.xxh3_128(size.to_bytes(8, "little"))
        for at, length in parts:
            digest.update(os.pread(file.fileno(), length, at))
    return size, digest.hexdigest()


def whole_digest(path: str | Path) -> str:
    """Return the digest of all bytes of a file. Raises OSError."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def build_index(path: str | Path, digest: str | None = None) -> TarIndex:
    """Walk a tar and group its members into samples. All of it is read, unless its `digest` is known.

    Raises UserError as `walk`, and for duplicate keys or suffixes.
    """
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
    return _to_index(path, digest or whole_digest(path), list(keys), first, rows)


def _to_index(
    path: str | Path, digest: str, keys: list[str], first: list[int], rows: list[tuple[int, int, int, int]]
) -> TarIndex:
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    starts = np.array([*first, len(rows)], dtype=np.int64)
    running = np.concatenate([[0], np.cumsum(table[:, 2] == IMAGE)])
    size, sampled = sampled_digest(path)
    return TarIndex(
        path=str(path),
        tar_size=size,
        digest=digest,
        sampled=sampled,
        first=starts,
        offset=table[:, 0].copy(),
        size=table[:, 1].copy(),
        key_end=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        number=table[:, 3].astype(np.uint16),
        images_per_row=np.diff(running[starts]).astype(np.uint16),
        kind=table[:, 2].astype(np.uint8),
        keys=np.frombuffer(b"".join(encoded), dtype=np.uint8),
    )


def _refusal(path: Path, tar: str | Path, error: Exception) -> DamagedIndexError:
    return DamagedIndexError(f"index {path} is damaged ({error}); build it again: python -m data index {tar}")


def _header(raw: bytes, size: int, path: Path, tar: str | Path) -> tuple[dict[str, Any], int]:
    """Return (JSON header, where the columns begin) from the first bytes of an index of `size` bytes.

    Raises ValueError, KeyError or TypeError when it is damaged or cannot be, UserError when it has another version.
    """
    if raw[:8] != MAGIC:
        raise ValueError("wrong magic")
    end = 16 + int.from_bytes(raw[8:16], "little")
    if len(raw) < end:
        raise ValueError("too short")
    whole = raw[end : end + SUM] == xxhash.xxh3_128_digest(raw[:end])
    header = parse_json(raw[16:end])
    version = header["v"]
    if type(version) is int and version != VERSION and (whole or 0 < version < VERSION):  # older ones had no checksum
        raise UserError(
            f"index {path} has version {version}, this program reads version {VERSION}; build it again: "
            f"python -m data index {tar}"
        )
    if not whole or type(version) is not int or version != VERSION:
        raise ValueError("wrong checksum")
    lengths = {name: _count(header["lengths"][name]) for name in COLUMNS}
    samples, members = lengths["first"] - 1, lengths["offset"]
    expected = {"first": samples + 1, "key_end": samples + 1, "images_per_row": samples}
    expected |= dict.fromkeys(("offset", "size", "number", "kind"), members)
    if samples < 0 or any(lengths[name] != length for name, length in expected.items()):
        raise ValueError("its columns do not belong together")
    if size != end + SUM + sum(dtype.itemsize * lengths[name] for name, dtype in COLUMNS.items()):
        raise ValueError(f"it has {size} bytes, not what its header says")
    if any(_count(header["usable"][kind]) > samples for kind in KINDS):
        raise ValueError("more samples can be used than there are")
    return header, end + SUM


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is not a count")
    return value


def _head_of(header: Mapping[str, Any]) -> IndexHead:
    usable = {kind: int(header["usable"][kind]) for kind in KINDS}
    return IndexHead(_count(header["tar_size"]), str(header["digest"]), str(header["sampled"]), usable)


def read_head(tar: str | Path, sidecar: Path | None = None) -> IndexHead:
    """Return the head of a tar's index, from its first bytes.

    Raises DamagedIndexError, UserError for another version, and OSError when it cannot be read.
    """
    path = sidecar or index_path(tar)
    try:
        with path.open("rb") as file:
            header, _ = _header(file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size, path, tar)
        return _head_of(header)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise _refusal(path, tar, error) from None


def load_index(
    tar: str | Path, sidecar: Path | None = None, *, local: str | Path = "", check: bool = True, read: bool = True
) -> TarIndex:
    """Map a tar's index; its columns are compared with their checksum unless `read` is off.

    Raises DamagedIndexError, and UserError when it has another version or does not belong to the tar as it is now.
    `local` is the file to compare it with when that is a copy; without `check` nothing is compared.
    """
    path = sidecar or index_path(tar)
    try:
        # A plain view: slicing a memmap object costs several times as much.
        raw = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        header, at = _header(raw[:HEAD_BYTES].tobytes(), len(raw), path, tar)
        head, begin, columns = _head_of(header), at, {}
        for name, dtype in COLUMNS.items():
            stop = at + dtype.itemsize * header["lengths"][name]
            columns[name] = raw[at:stop].view(dtype)
            at = stop
        index = TarIndex(str(tar), head.tar_size, head.digest, head.sampled, **columns)
        if read:
            if xxhash.xxh3_128_hexdigest(raw[begin:].data) != header["columns"]:
                raise ValueError("wrong checksum of its columns")
            _check_columns(index, head)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise _refusal(path, tar, error) from None
    if check:
        check_tar(index.path, head, local or tar)
    return index


def _check_columns(index: TarIndex, head: IndexHead) -> None:
    """Raise ValueError for numbers that no walk over a tar gives: a checksum does not say who wrote them."""
    for ends, last in ((index.first, len(index.offset)), (index.key_end, len(index.keys))):
        if ends[0] != 0 or ends[-1] != last or (np.diff(ends) < 0).any():
            raise ValueError("its rows do not follow each other")
    outside = (index.offset < 0) | (index.size < 0) | (index.offset > head.tar_size - index.size)
    if outside.any():
        raise ValueError("a member lies outside of the tar")
    if index.head().usable != head.usable:
        raise ValueError("its samples are not as many as its header says")


def wrong_size(tar: str | Path, size: int, expected: int) -> UserError:
    """Return the error for a tar whose size is not the one in its index."""
    return UserError(
        f"shard {tar} has {size} bytes but its index was built for {expected}: the shard is truncated or was replaced; "
        f"fetch it again, or if it is intact: python -m data index {tar}"
    )


def check_tar(tar: str, head: IndexHead, local: str | Path, *, whole: bool = False) -> None:
    """Raise UserError unless the tar (whose bytes are in `local`) is the one that was indexed.

    Some of its bytes are compared, or with `whole` all.
    """
    try:
        size, sampled = sampled_digest(local)
        if size != head.tar_size:
            raise wrong_size(tar, size, head.tar_size)
        changed = whole_digest(local) != head.digest if whole else sampled != head.sampled
    except FileNotFoundError:
        raise UserError(f"shard {tar} does not exist") from None
    if changed:
        raise UserError(f"shard {tar} changed after its index was built; build it again: python -m data index {tar}")


def open_index(tar: str | Path) -> TarIndex:
    """Return the index of a tar: the one beside it, or one built now and saved there if the folder can be written."""
    if index_path(tar).exists():
        try:
            return load_index(tar)
        except DamagedIndexError as error:
            return remake_index(tar, error)
    return make_index(tar)


def make_index(tar: str | Path) -> TarIndex:
    """Build the index of a tar and save it beside it, if the folder can be written."""
    index = build_index(tar)
    with contextlib.suppress(OSError):
        index.save(index_path(tar))
    return index


def remake_index(tar: str | Path, error: DamagedIndexError) -> TarIndex:
    """Build a damaged index again, and say so."""
    warn(f"{str(error).partition(';')[0]}; it is made again from the shard")
    return make_index(tar)
