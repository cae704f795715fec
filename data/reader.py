"""One sample of a shard at a time, by its place: one read, and pictures only when they are asked for."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import ContentError
from data.index import JSON, PICTURE, TEXT, TarIndex
from data.mmc4 import Mmc4Rule, is_mmc4, mmc4_page
from data.page import Node, Text, check_pictures, nodes_of
from data.retry import Retry
from data.tar import LFS

WHOLE = 1 << 20  # a sample of at most this many bytes is read at once, of a larger one only what is needed
MAX_OPEN = 256


@dataclass(frozen=True, slots=True)
class RawSample:
    """A sample with its pictures still encoded: `picture(i)` reads number i of the page."""

    key: str
    where: str
    nodes: list[Node]
    meta: dict[str, Any]
    numbers: Sequence[int]
    picture: Callable[[int], bytes]


class ShardReader:
    """Reads samples of many shards. File descriptors stay open, the least used is closed first.

    `local` gives the file that holds a shard (a remote one's copy). `samples_read` and `bytes_read` count the work.
    """

    def __init__(
        self,
        indexes: Sequence[TarIndex],
        *,
        local: Callable[[str], str] = str,
        retry: Retry | None = None,
        max_open: int = MAX_OPEN,
        mmc4: Mmc4Rule | None = None,
    ) -> None:
        self.indexes, self.local, self.max_open = indexes, local, max_open
        self.retry = retry or Retry()
        self.mmc4 = mmc4 or Mmc4Rule()
        self.samples_read = self.bytes_read = 0
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": OrderedDict()}  # a descriptor means nothing in another process

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        try:
            return self._once(shard, offset, size)
        except OSError:
            path = self.indexes[shard].path
            self.retry.repeats += 1
            return self.retry(lambda: self._once(shard, offset, size), f"shard {path}")

    def _once(self, shard: int, offset: int, size: int) -> bytes:
        descriptor = self._open.get(shard)
        if descriptor is None:
            descriptor = os.open(self.local(self.indexes[shard].path), os.O_RDONLY | os.O_CLOEXEC)
            self._open[shard] = descriptor
            if len(self._open) > self.max_open:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard)
        try:
            data = os.pread(descriptor, size, offset)
        except OSError:
            self._forget(shard)
            raise
        self.bytes_read += len(data)
        if len(data) < size:
            self._forget(shard)
            raise OSError(f"it is truncated: byte {offset + size} is needed, it ends at {offset + len(data)}")
        return data

    def _forget(self, shard: int) -> None:
        os.close(self._open.pop(shard))

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def sample(self, shard: int, row: int, *, pictures: bool = True) -> RawSample:
        """A sample; without `pictures` only its text is read ahead.

        Raises ContentError for broken JSON or text, UserError for pictures that are not there.
        """
        index = self.indexes[shard]
        members = index.members(row)
        self.samples_read += 1
        begin, end = members[0][2], members[-1][2] + members[-1][3]
        whole = self._read(shard, begin, end - begin) if pictures and end - begin <= WHOLE else None

        def read(offset: int, size: int) -> bytes:
            return self._read(shard, offset, size) if whole is None else whole[offset - begin : offset - begin + size]

        places: dict[int, tuple[int, int]] = {}
        parts: dict[int, bytes] = {}
        for kind, number, offset, size in members:
            if kind == PICTURE:
                places.setdefault(number, (offset, size))
            elif kind in (JSON, TEXT):
                parts[kind] = read(offset, size)
        key = index.key(row)
        where = f"shard {index.path}, row {row} (key {key!r})"
        try:
            nodes, meta = nodes_of(parts.get(JSON), parts.get(TEXT), len(places))
            if is_mmc4(meta):
                nodes, inside = mmc4_page(meta, self.mmc4)
                return RawSample(key, where, nodes, {}, range(len(inside)), lambda number: inside[number].decode())
        except (ValueError, RecursionError) as error:
            pointer = parts.get(JSON, b"").startswith(LFS)
            raise ContentError("bad text or JSON", "it is a Git-LFS pointer" if pointer else str(error)) from None
        check_text(nodes)
        check_pictures(nodes, places, where)
        return RawSample(key, where, nodes, meta, sorted(places), lambda number: read(*places[number]))


def check_text(nodes: Sequence[Node]) -> None:
    """Raise ContentError for text that is no Unicode (JSON can hold half a character), which no tokenizer takes."""
    for node in nodes:
        if isinstance(node, Text) and not node.text.isascii():
            try:
                node.text.encode()
            except UnicodeEncodeError as error:
                raise ContentError("bad text or JSON", f"text is no Unicode ({error.reason})") from None
