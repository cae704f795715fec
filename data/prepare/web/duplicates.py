"""Counts what repeats over a corpus, shard by shard, and joins the counts in one table of what repeats too often.

Everything is identified by 64 bits of its BLAKE2b hash. A shard's counts are a file of their own, so counting resumes
where it was stopped and several processes share it; the table holds only what is to be left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from data.shards.document import Document, Text
from flamingo.files import write_atomically

Hashes = NDArray[np.uint64]
ONCE = ("urls", "sets")  # one document with the same of these is kept, the others are dropped
KINDS = ("images", "paragraphs", *ONCE)


def hash_of(data: bytes) -> int:
    """Return 64 bits of the hash of some bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def site_of(document: Document) -> str:
    """Return the host of a document's address, "" where it has none."""
    url = document.meta.get("url")
    try:
        return (urlsplit(url).hostname or "") if isinstance(url, str) else ""
    except ValueError:
        return ""


def paragraph_hash(site: str, paragraph: str) -> int:
    """Return the hash of a paragraph; paragraphs of different sites are different."""
    return hash_of(f"{site}\0{paragraph.strip()}".encode("utf-8", "replace"))


def paragraphs_of(document: Document) -> Iterator[str]:
    """Yield the paragraphs of a document: text between empty lines and images."""
    for node in document.nodes:
        if isinstance(node, Text):
            yield from (part for part in node.text.split("\n\n") if part.strip())


def document_hashes(document: Document) -> dict[str, list[int]]:
    """Return the hashes of each of `KINDS` in a document, without repetitions."""
    images = sorted({hash_of(image) for image in document.images})
    site, url = site_of(document), document.meta.get("url")
    return {
        "images": images,
        "paragraphs": sorted({paragraph_hash(site, text) for text in paragraphs_of(document)}) if site else [],
        "urls": [hash_of(url.encode("utf-8", "replace"))] if isinstance(url, str) and url else [],
        "sets": [hash_of(np.array(images, dtype=np.uint64).tobytes())] if images else [],
    }


def count(documents: Iterable[tuple[int, Document]], path: Path) -> None:
    """Write the hashes of (row, document) of a shard: for `ONCE` also the rows, to know which document is the last."""
    columns: dict[str, list[int]] = {name: [] for name in (*KINDS, *(f"{kind}_rows" for kind in ONCE))}
    for row, document in documents:
        for kind, hashes in document_hashes(document).items():
            columns[kind] += hashes
            if kind in ONCE:
                columns[f"{kind}_rows"] += [row] * len(hashes)
    _write(path, {name: np.array(values, dtype=np.uint64) for name, values in columns.items()})


def _write(path: Path, columns: Any) -> None:
    """Write columns under a name when they are whole."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, numpy would append .npz to it
            np.savez(file, **columns)

    write_atomically(path, write, shared=True)


@dataclass(frozen=True, slots=True)
class RepeatTable:
    """What to leave out: sorted hashes of images and paragraphs, and for `ONCE` what repeats and what to keep."""

    images: Hashes
    paragraphs: Hashes
    urls: Hashes
    urls_kept: Hashes
    sets: Hashes
    sets_kept: Hashes

    def has(self, kind: str, value: int) -> bool:
        """Return whether an image or paragraph is one that occurs too often."""
        known: Hashes = getattr(self, kind)
        at = int(np.searchsorted(known, np.uint64(value)))
        return at < len(known) and int(known[at]) == value

    def keeps(self, kind: str, value: int, position: int) -> bool:
        """Return whether the document at `position` (see `position_of`) is the one kept of its address or image set."""
        known: Hashes = getattr(self, kind)
        at = int(np.searchsorted(known, np.uint64(value)))
        repeats = at < len(known) and int(known[at]) == value
        return not repeats or int(getattr(self, f"{kind}_kept")[at]) == position

    def save(self, path: Path) -> None:
        """Write the table; it appears under its name when it is complete."""
        _write(path, {name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def load(cls, path: str | Path) -> RepeatTable:
        """Read a table that `save` wrote."""
        with np.load(path, allow_pickle=False) as body:
            return cls(**{name: body[name] for name in cls.__dataclass_fields__})


def position_of(shard: int, row: int) -> int:
    """Return a document's position in the corpus as one number."""
    return shard << 32 | row


def tabulate(files: Sequence[Path], most_images: int, most_paragraphs: int) -> RepeatTable:
    """Join the counts of all shards: 8 bytes of memory for each image and paragraph of the corpus, twice."""
    columns: dict[str, Any] = {}
    for kind, most in (("images", most_images), ("paragraphs", most_paragraphs)):
        values, counts = np.unique(_column(files, kind), return_counts=True)
        columns[kind] = values[counts > most] if most else values[:0]
        del values, counts
    for kind in ONCE:
        values = _column(files, kind)
        positions = _column(files, f"{kind}_rows", with_shard=True)
        order = np.lexsort((positions, values))
        values, positions = values[order], positions[order]
        last = np.append(values[1:] != values[:-1], True)[: len(values)]  # the last document of each
        again = np.append(False, values[1:] == values[:-1])[: len(values)]
        columns[kind], columns[f"{kind}_kept"] = values[last & again], positions[last & again]
    return RepeatTable(**columns)


def _column(files: Sequence[Path], name: str, with_shard: bool = False) -> Hashes:
    parts = []
    for shard_index, path in enumerate(files):
        with np.load(path, allow_pickle=False) as body:
            parts.append(body[name] + np.uint64(shard_index << 32) if with_shard else body[name])
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)
