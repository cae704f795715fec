"""Finds what is nearly the same over a corpus: texts by MinHash (datasketch), images by a perceptual hash (imagehash).

Two texts are compared by their shingles of five words: the share that both have is estimated from 128 minima. Two
images are compared by the 64 bits of the low frequencies of their light, which resizing, another format and mild
compression leave almost as they are; colour is not seen. Near duplicates of near duplicates belong together.

Nothing is compared with everything. Texts meet in bands of their signature, images in the blocks of bits that two
hashes within the distance must share, one band or pair of blocks at a time: less than 100 bytes of memory for each
text or image of the corpus, while the signatures (512 bytes a text) stay on the disk.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from data.errors import ContentError
from data.prepare.inputs import required
from data.shards.document import Document, Text

PERMUTATIONS, SHINGLE, SEED = 128, 5, 1
MISSED = 1e-3  # of the pairs exactly at the threshold, those that meet in no band
LEAST_BITS = 8  # set in the hash of an image that shows anything: a plain one has almost none
UNSEEN = 0  # the hash of an image that cannot be compared
_LETTERS = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_LETTERS}]|[^\W{_LETTERS}]+")  # in scripts without spaces each character is a word
Hashes = NDArray[np.uint64]


def text_signature(document: Document) -> NDArray[np.uint32] | None:
    """Return the minima of a document's text, (128,) uint32; None when it has no word. Fewer words are one shingle."""
    text = " ".join(node.text for node in document.nodes if isinstance(node, Text))
    words = [word.encode("utf-8", "replace") for word in _WORD.findall(unicodedata.normalize("NFKC", text).lower())]
    if not words:
        return None
    shingles = {b" ".join(words[n : n + SHINGLE]) for n in range(max(1, len(words) - SHINGLE + 1))}
    sketch = required("datasketch", "--near-text", extra="dedupe").MinHash(num_perm=PERMUTATIONS, seed=SEED)
    sketch.update_batch(sorted(shingles))
    return np.asarray(sketch.hashvalues).astype(np.uint32)


def image_look(data: bytes) -> int:
    """Return the perceptual hash of an image, 64 bits; UNSEEN when it is plain or cannot be decoded."""
    from PIL import Image

    from data.batches.decode import decode  # brings torch along

    try:
        pixels = decode(data, at_least=64)
    except ContentError:
        return UNSEEN
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    bits = required("imagehash", "--near-images", extra="dedupe").phash(image).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big") if bits.sum() >= LEAST_BITS else UNSEEN


class Groups:
    """N things of which some belong together; a group is known by its last member."""

    def __init__(self, number: int) -> None:
        self._above = np.arange(number, dtype=np.int64)

    def last(self, member: int) -> int:
        """Return the last member of the group of a member."""
        above = self._above
        while above[member] != member:
            above[member] = above[above[member]]
            member = int(above[member])
        return member

    def join(self, one: int, other: int) -> None:
        """Make one group of two."""
        first, last = sorted((self.last(one), self.last(other)))
        self._above[first] = last

    def lasts(self) -> NDArray[np.int64]:
        """Return the last member of the group of each, (N,)."""
        return np.array([self.last(member) for member in range(len(self._above))], dtype=np.int64)


def alike_texts(signatures: NDArray[np.uint32], threshold: float) -> NDArray[np.int64]:
    """Return for each of N texts, (N,), the last of those that are nearly the same, directly or by others.

    Args:
        signatures: (N, 128), in the order of the corpus; may be mapped from a file.
        threshold: the least share of shingles that two texts have in common.
    """
    rows, groups = _rows_of_a_band(threshold), Groups(len(signatures))
    for first in range(0, PERMUTATIONS - rows + 1, rows):
        for members in _sharing(_band(signatures, first, first + rows)):
            known: list[int] = []  # of this band, each unlike the others; most bands have one
            for member in members[::-1].tolist():
                same = np.mean(signatures[known] == signatures[member], axis=1) >= threshold if known else np.empty(0)
                for at in np.flatnonzero(same).tolist():
                    groups.join(member, known[at])
                if not same.any():
                    known.append(member)
    return groups.lasts()


def _rows_of_a_band(threshold: float) -> int:
    """Return the most rows of a band with which texts at the threshold meet in some band, but for MISSED of them."""
    fits = [r for r in range(1, PERMUTATIONS) if (1 - threshold**r) ** (PERMUTATIONS // r) <= MISSED]
    return max(fits, default=1)


def _band(signatures: NDArray[np.uint32], first: int, last: int, chunk: int = 1 << 18) -> Hashes:
    keys = np.zeros(len(signatures), np.uint64)
    for begin in range(0, len(keys), chunk):
        part = keys[begin : begin + chunk]
        for column in np.asarray(signatures[begin : begin + chunk, first:last]).T:
            part ^= column.astype(np.uint64)
            part *= np.uint64(0x9E3779B97F4A7C15)
            part ^= part >> np.uint64(29)
    return keys


def alike_looks(looks: Hashes, bits: int) -> NDArray[np.int64]:
    """Return for each of N different perceptual hashes, (N,), the last of those within `bits` of it, or by others.

    Hashes that differ in at most `bits` of 64 bits agree in two or more of `bits + 2` blocks of them.
    """
    groups = Groups(len(looks))
    masks = [sum(1 << int(bit) for bit in block) for block in np.array_split(np.arange(64), bits + 2)]
    for one, two in combinations(masks, 2) if bits else ():
        for members in _sharing(looks & np.uint64(one | two)):
            for at, member in enumerate(members[:-1].tolist()):
                others = members[at + 1 :]
                for other in others[_ones(looks[others] ^ looks[member]) <= bits].tolist():
                    groups.join(member, other)
    return groups.lasts()


def _ones(values: Hashes) -> NDArray[np.int64]:
    return np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1, dtype=np.int64)


def _sharing(keys: Hashes) -> Iterator[NDArray[np.int64]]:
    """Yield the places, ascending, of every value that occurs more than once."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    edges = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    for at in np.flatnonzero(np.diff(edges) > 1).tolist():
        yield order[edges[at] : edges[at + 1]]
