"""One sample of a shard at a time, by its place: one read, and pictures only when they are asked for."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import ContentError
from data.index import JSON, PICTURE, TEXT, TarIndex
from data.page import Node, check_pictures, nodes_of
from flamingo.errors import UserError

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
    """Reads samples of many shards. File descriptors stay open, the least used is closed first."""

    def __init__(self, indexes: Sequence[TarIndex]) -> None:
        self.indexes = indexes
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"indexes": self.indexes, "_open": OrderedDict()}  # a descriptor means nothing in another process

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        path = self.indexes[shard].path
        if shard not in self._open:
            try:
                self._open[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise UserError(f"shard {path} does not exist any more") from None
            if len(self._open) > MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard)
        data = os.pread(self._open[shard], size, offset)
        if len(data) < size:
            raise UserError(
                f"shard {path} is truncated: byte {offset + size} is needed, it ends at {offset + len(data)}"
            )
        return data

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def sample(self, shard: int, row: int) -> RawSample:
        """A sample. Raises ContentError for broken JSON or text, UserError for pictures that are not there."""
        index = self.indexes[shard]
        members = index.members(row)
        begin, end = members[0][2], members[-1][2] + members[-1][3]
        whole = self._read(shard, begin, end - begin) if end - begin <= WHOLE else None

        def read(offset: int, size: int) -> bytes:
            return self._read(shard, offset, size) if whole is None else whole[offset - begin : offset - begin + size]

        pictures: dict[int, tuple[int, int]] = {}
        parts: dict[int, bytes] = {}
        for kind, number, offset, size in members:
            if kind == PICTURE:
                pictures.setdefault(number, (offset, size))
            elif kind in (JSON, TEXT):
                parts[kind] = read(offset, size)
        key = index.key(row)
        where = f"shard {index.path}, row {row} (key {key!r})"
        try:
            nodes, meta = nodes_of(parts.get(JSON), parts.get(TEXT), len(pictures))
        except ValueError as error:
            raise ContentError("bad text or JSON", str(error)) from None
        check_pictures(nodes, pictures, where)
        return RawSample(key, where, nodes, meta, sorted(pictures), lambda number: read(*pictures[number]))
