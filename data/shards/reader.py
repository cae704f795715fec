"""Reads one sample of a shard at a time: only the bytes that are needed, in few reads.

Neighbouring members are read together as long as the bytes between them (headers of the tar) stay a small part of the
read; of a document with ten images of which a row shows three, three are read.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import ContentError
from data.shards.document import Document, Node, Text, check_images, document_of, facts_of, pair_of
from data.shards.index import TarIndex
from data.shards.mmc4 import Mmc4Rule, is_mmc4, mmc4_document
from data.shards.retry import Retry
from data.shards.samples import IMAGE, JSON, TEXT
from data.shards.tar import LFS

SLACK = 0.04  # bytes read needlessly, as a share of those needed, for the sake of fewer reads
MAX_OPEN = 256
LONGEST_TEXT = 10_000_000
"""Characters of a document. A tokenizer takes 200 bytes and nearly a microsecond for each."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """A sample with its images still encoded: `image(i)` returns image i of the document, reading it when asked.

    `fetch` reads several at once: announce which ones will be needed, and neighbours are read together. `row` is the
    sample's row in its shard, where that may differ from its number among those that the dataset can use.
    """

    key: str
    where: str
    nodes: list[Node]
    meta: dict[str, Any]
    numbers: Sequence[int]
    image: Callable[[int], bytes]
    fetch: Callable[[Sequence[int]], None] = lambda numbers: None
    row: int | None = None


def raw_sample(document: Document, key: str) -> RawSample:
    """Return a document in memory as a sample. Raises ContentError for text that is not Unicode."""
    check_text(document.nodes)
    numbers = range(len(document.images))
    return RawSample(key, f"document {key!r}", document.nodes, document.meta, numbers, document.images.__getitem__)


class ShardReader:
    """Reads samples of many shards. File descriptors stay open; the least recently used is closed first.

    `local` returns the file that holds a shard (a remote one's copy). `samples_read` and `bytes_read` count the work,
    `bytes_used` the bytes that were asked for.
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
        self.samples_read = self.bytes_read = self.bytes_used = 0
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": OrderedDict()}  # a descriptor is valid in its own process only

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Read bytes of a shard, again when it fails. Raises UserError when it keeps failing."""
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

    def sample(self, shard: int, row: int, *, images: bool = True) -> RawSample:
        """Return a sample; its text is read now, and with `images` the image of a pair too.

        Raises ContentError for broken JSON or text, UserError for missing images.
        """
        index = self.indexes[shard]
        self.samples_read += 1
        positions: dict[int, tuple[int, int]] = {}
        texts: dict[int, tuple[int, int]] = {}
        for kind, number, offset, size in index.members(row):
            if kind == IMAGE:
                positions.setdefault(number, (offset, size))
            elif kind in (JSON, TEXT):
                texts[kind] = offset, size
        known = _SampleBytes(self, shard)
        known.fetch([*texts.values(), *(positions.values() if images and len(positions) == 1 else ())])
        parts = {kind: known.of(*position) for kind, position in texts.items()}
        key = index.key(row)
        where = f"shard {index.path}, row {row} (key {key!r})"
        try:
            meta = facts_of(parts.get(JSON))
            if "nodes" in meta:
                nodes, meta = document_of(meta)
            elif is_mmc4(meta):
                nodes, inside = mmc4_document(meta, self.mmc4)
                check_text(nodes)
                numbers = range(len(inside))
                return RawSample(key, where, nodes, {}, numbers, lambda number: inside[number].decode(), row=row)
            else:
                positions = dict(enumerate(positions[number] for number in sorted(positions)))
                nodes = pair_of(parts.get(TEXT), meta, len(positions))
        except (ValueError, RecursionError) as error:
            pointer = parts.get(JSON, b"").startswith(LFS)
            raise ContentError("bad text or JSON", "it is a Git-LFS pointer" if pointer else str(error)) from None
        check_text(nodes)
        check_images(nodes, positions, where)
        return RawSample(
            key,
            where,
            nodes,
            meta,
            sorted(positions),
            lambda number: known.of(*positions[number]),
            lambda numbers: known.fetch([positions[number] for number in numbers]),
            row,
        )


class _SampleBytes:
    """The bytes of a sample that were read so far."""

    def __init__(self, reader: ShardReader, shard: int) -> None:
        self.reader, self.shard = reader, shard
        self.known: list[tuple[int, bytes]] = []

    def _find(self, offset: int, size: int) -> bytes | None:
        for begin, data in self.known:
            if begin <= offset and offset + size <= begin + len(data):
                return data[offset - begin : offset - begin + size]
        return None

    def fetch(self, positions: Sequence[tuple[int, int]]) -> None:
        """Read these ranges, unless they are known."""
        for offset, size in runs([position for position in positions if self._find(*position) is None]):
            self.known.append((offset, self.reader.read(self.shard, offset, size)))

    def of(self, offset: int, size: int) -> bytes:
        """Return the bytes of a member."""
        self.reader.bytes_used += size
        data = self._find(offset, size)
        return self.reader.read(self.shard, offset, size) if data is None else data


def runs(positions: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return (offset, size) of reads that cover these ranges, joining neighbours while gaps stay within SLACK."""
    spare = SLACK * sum(size for _, size in positions)
    reads: list[tuple[int, int]] = []
    for offset, size in sorted(positions):
        gap = offset - sum(reads[-1]) if reads else 0
        if reads and gap <= spare:
            spare -= gap
            reads[-1] = reads[-1][0], reads[-1][1] + gap + size
        else:
            reads.append((offset, size))
    return reads


def check_text(nodes: Sequence[Node]) -> None:
    """Raise ContentError for text that no tokenizer takes: half a character, which JSON can hold, or more than fits."""
    if (length := sum(len(node.text) for node in nodes if isinstance(node, Text))) > LONGEST_TEXT:
        raise ContentError("text too long", f"{length:,} characters; at most {LONGEST_TEXT:,} are tokenized at once")
    for node in nodes:
        if isinstance(node, Text) and not node.text.isascii():
            try:
                node.text.encode()
            except UnicodeEncodeError as error:
                raise ContentError("bad text or JSON", f"text is not Unicode ({error.reason})") from None
