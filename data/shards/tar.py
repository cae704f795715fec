"""Reads the headers of a tar through a memory map: POSIX ustar, PAX and GNU long names.

About ten times faster than `tarfile`, and stricter: `tarfile` accepts a file that stops between two members, here the
end mark is required. What follows an end mark is read as another tar (`cat a.tar b.tar`), or refused.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flamingo.errors import UserError

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
ZEROS = bytes(512)
NOT_ZERO = re.compile(rb"[^\0]")
LFS = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its name, offset and size in bytes."""

    name: str
    offset: int
    size: int


def _number(raw: bytes) -> int:
    """Return a tar header's number: octal digits, or base 256 when the first bit is set."""
    if raw[0] in (0x80, 0xFF):
        value = int.from_bytes(raw[1:], "big")
        return value if raw[0] == 0x80 else value - (1 << 8 * (len(raw) - 1))
    return int(raw.split(b"\0", 1)[0].strip() or b"0", 8)


def _string(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax(body: bytes) -> dict[str, str]:
    """Return those records "length key=value\\n" of a PAX header that say where a member lies and what it is called.

    Raises ValueError for anything else than records.
    """
    records = {}
    at = 0
    while at < len(body) and body[at] != 0:
        digits, space, _ = body[at : at + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        end = at + length
        if length < len(digits) + 3 or body[end - 1 : end] != b"\n":
            raise ValueError
        key, equals, value = body[at + len(digits) + 1 : end - 1].partition(b"=")
        if not equals:
            raise ValueError
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse"):
            records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at = end
    return records


def walk(path: str | Path) -> Iterator[Member]:
    """Yield the regular members of an uncompressed tar, in its order.

    Raises UserError, naming the tar, when it is missing, empty, compressed, truncated or not a tar. Member names are
    only ever keys: nothing is extracted, so a name like `../x` or a link leads nowhere.
    """
    if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
        raise UserError(f"shard {path} is a pipe or a device, a tar was expected")
    try:
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise UserError(f"shard {path} is empty (0 bytes); write or download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                yield from _walk(view, path)
    except FileNotFoundError:
        raise UserError(f"shard {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"shard {path} is a folder, a tar was expected") from None


def _walk(view: mmap.mmap, path: str | Path) -> Iterator[Member]:
    for magic, kind in COMPRESSED.items():
        if view[: len(magic)] == magic:
            raise UserError(f"shard {path} is {kind}-compressed; decompress it first (offsets need a plain tar)")
    if view[: len(LFS)] == LFS:
        raise UserError(f"shard {path} is not a tar but a Git-LFS pointer to one; fetch the shard itself: git lfs pull")
    end, at = len(view), 0
    common: dict[str, str] = {}  # PAX records for all members that follow
    own: dict[str, str] = {}  # and for the next one
    while True:
        header = view[at : at + 512]
        if header == ZEROS:
            if (at := _next_archive(view, at)) == end:
                return
            common, own = {}, {}
            continue
        if len(header) < 512:
            raise UserError(f"shard {path} is truncated: it stops at byte {end} without the end mark of a tar")
        kind_flag, start = header[156:157], at + 512
        try:
            if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 256:
                raise ValueError
            records = common | own
            size = _number(header[124:136])
            if kind_flag not in b"xgLK" and "size" in records:
                size = int(records["size"])
            if size < 0:
                raise ValueError
            has_body = kind_flag in b"\0000SxgLK7" or kind_flag not in b"123456"
            at = start + (-(-size // 512) * 512 if has_body else 0)
            if has_body and start + size > end:
                raise EOFError
            if kind_flag == b"x":
                own |= _pax(view[start : start + size])
            elif kind_flag == b"g":
                common |= _pax(view[start : start + size])
        except EOFError:
            raise UserError(f"shard {path} is truncated: byte {start + size} is needed, the file has {end}") from None
        except ValueError:
            what = "a PAX header cannot be read" if kind_flag in b"xg" and kind_flag else "no header"
            raise UserError(f"shard {path} is not a tar, or is damaged: {what} at byte {start - 512}") from None
        if kind_flag == b"L":
            own["path"] = _string(view[start : start + size])
        elif kind_flag == b"S" or any(name.startswith("GNU.sparse") for name in records):
            raise UserError(f"shard {path} has sparse members, which are not supported; write it again without them")
        elif kind_flag not in b"xgK":
            name, prefix = _string(header[:100]), _string(header[345:500])
            name = records.get("path") or (f"{prefix}/{name}" if prefix else name)
            own = {}
            if kind_flag in b"07" or (kind_flag == b"\0" and not name.endswith("/")):
                yield Member(name, start, size)


def _next_archive(view: mmap.mmap, at: int) -> int:
    """Return where the header of the next of several concatenated tars is, or the end of the file."""
    more = NOT_ZERO.search(view, at)
    return len(view) if more is None else more.start() // 512 * 512
