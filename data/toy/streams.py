"""Counter-based random streams: a document's randomness is a function of (seed, purpose, index) and of nothing else."""

from __future__ import annotations

import zlib

import numpy as np


def stream(seed: int, purpose: str, index: int) -> np.random.Generator:
    """Return the generator of item `index` of `purpose`: equal arguments give equal numbers, others independent ones.

    Philox takes the seed and the purpose as its key and starts counting at `index` in the highest word of its
    counter, so the streams of two items would meet only after 2**192 draws.
    """
    key = np.array([seed & (2**64 - 1), zlib.crc32(purpose.encode())], dtype=np.uint64)
    counter = np.array([0, 0, 0, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
