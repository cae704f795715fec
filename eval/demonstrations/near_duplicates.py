"""Near duplicates of images, told without a model: what a re-encoded, rescaled or renamed file has in common.

A difference hash alone calls every flat image a duplicate of every other, and two equal shapes in two colours too. So
two images are near duplicates when their hashes differ in at most `HAMMING` of 64 bits and their 8 x 8 thumbnails in
no channel of any cell by more than `LEVELS` of 256 levels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from eval.task import EncodedImage

HAMMING = 4
LEVELS = 14


@dataclass(frozen=True)
class Fingerprint:
    """Difference hash (64 bits) and colours of an 8 x 8 thumbnail, (192,) of 0 to 255."""

    bits: int
    colours: bytes


_KNOWN: dict[str, Fingerprint | None] = {}  # by SHA-256, so that an image is read and decoded once


def fingerprint(image: EncodedImage) -> Fingerprint | None:
    """Of an image, or of a clip's middle frame; None if it cannot be decoded, which the encoder will tell."""
    if image.sha256 not in _KNOWN:
        _KNOWN[image.sha256] = _fingerprint(image)
    return _KNOWN[image.sha256]


def _fingerprint(encoded: EncodedImage) -> Fingerprint | None:
    try:
        frames = encoded.frames
        image: Image.Image = Image.open(io.BytesIO(frames[len(frames) // 2]))
        image.draft("RGB", (64, 64))  # a JPEG is decoded at an eighth of its size where that is enough
        image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")
    small = np.asarray(image.resize((8, 8), Image.Resampling.BOX))
    return Fingerprint(bits, small.tobytes())


def near_duplicates(one: EncodedImage, other: EncodedImage) -> bool:
    """Whether two images show the same but for compression and scale."""
    a, b = fingerprint(one), fingerprint(other)
    if a is None or b is None or (a.bits ^ b.bits).bit_count() > HAMMING:
        return False
    return all(abs(x - y) <= LEVELS for x, y in zip(a.colours, b.colours, strict=True))
