"""Counts what repeats over a corpus, shard by shard, and joins the counts in one table of what repeats too often.

Everything is identified by 64 bits of its BLAKE2b hash. A shard's counts are a file of their own, so counting resumes
where it was stopped and several processes share it; the table holds only what is to be left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from data.prepare.web.near_duplicates import PERMUTATIONS, UNSEEN, alike_looks, alike_texts, image_look, text_signature
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


def document_hashes(document: Document, same: Callable[[int], int] = int) -> dict[str, list[int]]:
    """Return the hashes of each of `KINDS` in a document, without repetitions; `same` is one for images alike."""
    images = sorted({same(hash_of(image)) for image in document.images})
    site, url = site_of(document), document.meta.get("url")
    return {
        "images": images,
        "paragraphs": sorted({paragraph_hash(site, text) for text in paragraphs_of(document)}) if site else [],
        "urls": [hash_of(url.encode("utf-8", "replace"))] if isinstance(url, str) and url else [],
        "sets": [_set_hash(images)] if images else [],
    }


def _set_hash(images: Sequence[int]) -> int:
    return hash_of(np.array(images, dtype=np.uint64).tobytes())


@dataclass(frozen=True, slots=True)
class Near:
    """What counts as nearly the same: the share of shingles of two texts, the different bits of two images' hashes.

    None: only what is equal.
    """

    text: float | None = None
    images: int | None = None

    @property
    def suffix(self) -> str:
        """What tells counts with and without signatures apart in their files' names."""
        return "-text" * (self.text is not None) + "-images" * (self.images is not None)


def count(documents: Iterable[tuple[int, Document]], path: Path, near: Near = Near()) -> None:
    """Write the hashes of (row, document) of a shard: for `ONCE` also the rows, to know which document is the last.

    For `near` also, with their rows, the signatures of the texts and the perceptual hashes ("looks") of `images`.
    """
    extra = ("images_rows", "looks", "signatures_rows")
    columns: dict[str, list[int]] = {name: [] for name in (*KINDS, *(f"{kind}_rows" for kind in ONCE), *extra)}
    signatures: list[NDArray[np.uint32]] = []
    looks: dict[int, int] = {}
    for row, document in documents:
        hashes_of = document_hashes(document)
        for kind, hashes in hashes_of.items():
            columns[kind] += hashes
            if kind in ONCE:
                columns[f"{kind}_rows"] += [row] * len(hashes)
        if near.images is not None:
            for image in document.images:
                if (value := hash_of(image)) not in looks:
                    looks[value] = image_look(image)
            columns["looks"] += [looks[value] for value in hashes_of["images"]]
            columns["images_rows"] += [row] * len(hashes_of["images"])
        if near.text is not None and (signature := text_signature(document)) is not None:
            signatures.append(signature)
            columns["signatures_rows"].append(row)
    arrays: dict[str, Any] = {name: np.array(values, dtype=np.uint64) for name, values in columns.items()}
    _write(path, arrays | {"signatures": np.array(signatures, dtype=np.uint32).reshape(-1, PERMUTATIONS)})


def _write(path: Path, columns: Any) -> None:
    """Write columns under a name when they are whole."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, numpy would append .npz to it
            np.savez(file, **columns)

    write_atomically(path, write, shared=True)


@dataclass(frozen=True, slots=True)
class RepeatTable:
    """What to leave out: sorted hashes of images and paragraphs, and for `ONCE` what repeats and what to keep.

    `texts` are the positions of documents whose text a later one nearly has; `alike` the images that are taken for
    another one of about the same look, which is in `alike_as`.
    """

    images: Hashes
    paragraphs: Hashes
    urls: Hashes
    urls_kept: Hashes
    sets: Hashes
    sets_kept: Hashes
    texts: Hashes
    alike: Hashes
    alike_as: Hashes

    def has(self, kind: str, value: int) -> bool:
        """Return whether an image or paragraph is one that occurs too often, or the text at a position one too many."""
        known: Hashes = getattr(self, kind)
        at = int(np.searchsorted(known, np.uint64(value)))
        return at < len(known) and int(known[at]) == value

    def same(self, image: int) -> int:
        """Return the image (its hash) that an image is taken for: itself, unless it is alike another."""
        at = int(np.searchsorted(self.alike, np.uint64(image)))
        found = at < len(self.alike) and int(self.alike[at]) == image
        return int(self.alike_as[at]) if found else image

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


def tabulate(
    files: Sequence[Path], most_images: int, most_paragraphs: int, near: Near = Near(), folder: Path | None = None
) -> RepeatTable:
    """Join the counts of all shards: 8 bytes of memory for each image and paragraph of the corpus, twice.

    With `near`, less than 100 bytes for each text and image more; the signatures of the texts are gathered in `folder`.
    """
    columns: dict[str, Any] = {name: np.empty(0, np.uint64) for name in ("texts", "alike", "alike_as")}
    if near.images is not None:
        columns["alike"], columns["alike_as"] = _alike_images(files, near.images)
        files = [_retold(path, columns["alike"], columns["alike_as"], folder) for path in files]
    if near.text is not None:
        columns["texts"] = _texts_again(files, near.text, folder)
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


def _alike_images(files: Sequence[Path], bits: int) -> tuple[Hashes, Hashes]:
    """Return the sorted hashes of images that are alike another one, and the least hash of those of their look."""
    images, first = np.unique(_column(files, "images"), return_index=True)
    looks = _column(files, "looks")[first]
    images, looks = images[looks != UNSEEN], looks[looks != UNSEEN]
    different, look = np.unique(looks, return_inverse=True)
    group = alike_looks(different, bits)[look]
    least = np.full(len(different), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, group, images)
    other = least[group] != images
    return images[other], least[group][other]


def _retold(path: Path, alike: Hashes, alike_as: Hashes, folder: Path | None) -> Path:
    """Write a shard's counts again, images that are alike counted as one, and return the file."""
    with np.load(path, allow_pickle=False) as body:
        columns = {name: body[name] for name in body.files if name != "looks"}
    images, rows = columns["images"], columns["images_rows"]
    if len(alike):
        at = np.minimum(np.searchsorted(alike, images), len(alike) - 1)
        images = np.where(alike[at] == images, alike_as[at], images)
    pairs = np.unique(np.stack([rows, images], axis=1), axis=0) if len(rows) else np.empty((0, 2), np.uint64)
    edges = np.flatnonzero(np.diff(pairs[:, 0])) + 1
    sets = [_set_hash(part[:, 1].tolist()) for part in np.split(pairs, edges) if len(part)]
    columns |= {"images": pairs[:, 1], "sets": np.array(sets, np.uint64), "sets_rows": np.unique(pairs[:, 0])}
    assert folder is not None
    _write(target := folder / "retold" / path.name, columns)
    return target


def _texts_again(files: Sequence[Path], threshold: float, folder: Path | None) -> Hashes:
    """Return the sorted positions of the documents whose text is nearly that of a later one."""
    positions = _column(files, "signatures_rows", with_shard=True)
    if not len(positions):
        return positions
    assert folder is not None
    gathered = np.lib.format.open_memmap(folder / "signatures.npy", "w+", np.uint32, (len(positions), PERMUTATIONS))
    at = 0
    for path in files:
        with np.load(path, allow_pickle=False) as body:
            part = body["signatures"]
        gathered[at : at + len(part)] = part
        at += len(part)
    lasts = alike_texts(gathered, threshold)
    return positions[lasts != np.arange(len(lasts))]


def _column(files: Sequence[Path], name: str, with_shard: bool = False) -> Hashes:
    parts = []
    for shard_index, path in enumerate(files):
        with np.load(path, allow_pickle=False) as body:
            parts.append(body[name] + np.uint64(shard_index << 32) if with_shard else body[name])
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)
