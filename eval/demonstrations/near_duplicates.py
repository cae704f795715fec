"""Near duplicates of pictures, told without a model: what a re-encoded, rescaled or renamed file has in common.

A difference hash alone calls every flat picture a duplicate of every other, and two equal shapes in two colours too. So
two pictures are near duplicates when their hashes differ in at most `HAMMING` of 64 bits and their 8 x 8 thumbnails in
no channel of any cell by more than `LEVELS` of 256 levels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from eval.task import Picture

HAMMING = 4
LEVELS = 14


@dataclass(frozen=True)
class Fingerprint:
    """Difference hash (64 bits) and colours of an 8 x 8 thumbnail, (192,) of 0 to 255."""

    bits: int
    colours: bytes


_KNOWN: dict[str, Fingerprint | None] = {}  # by SHA-256, so that a picture is read and decoded once


def fingerprint(picture: Picture) -> Fingerprint | None:
    """Of a picture, or of a clip's middle frame; None if it cannot be decoded, which the encoder will tell."""
    if picture.sha256 not in _KNOWN:
        _KNOWN[picture.sha256] = _fingerprint(picture)
    return _KNOWN[picture.sha256]


def _fingerprint(picture: Picture) -> Fingerprint | None:
    try:
        frames = picture.frames
        image: Image.Image = Image.open(io.BytesIO(frames[len(frames) // 2]))
        image.draft("RGB", (64, 64))  # a JPEG is decoded at an eighth of its size where that is enough
        image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")
    small = np.asarray(image.resize((8, 8), Image.Resampling.BOX))
    return Fingerprint(bits, small.tobytes())


def near_duplicates(one: Picture, other: Picture) -> bool:
    """Whether two pictures show the same but for compression and scale."""
    a, b = fingerprint(one), fingerprint(other)
    if a is None or b is None or (a.bits ^ b.bits).bit_count() > HAMMING:
        return False
    return all(abs(x - y) <= LEVELS for x, y in zip(a.colours, b.colours, strict=True))
