"""The order of samples as a pure function of (seed, epoch, lane, position): nothing to save, nothing to replay.

In every epoch the shards are permuted and their samples laid end to end; this line is cut into C lanes of equal length
L = ceil(N / C) (the last lanes wrap around, by fewer than C samples); within a lane, samples are permuted inside blocks
of K shards. Slot i of global batch t belongs to lane i*C // B and is that lane's sample n = t*(B/C) + i mod (B/C), of
epoch n // L.

    N = 10 samples, C = 2 lanes, B = 4:      lane 0: a b c d e      lane 1: f g h i j
    batch 0: a b | f g     batch 1: c d | h i     batch 2: e A | j F     (A, F: first of the next epoch)

Ranks and workers do not appear in it: they only decide who reads which slots. A lane keeps at most K + 1 shards open,
and position n is computed without visiting positions 0 .. n-1, so resuming at step one million costs as little as
starting.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flamingo.errors import UserError

# What a stream of random numbers is for; part of its key, so that no two uses share numbers.
SHARDS, BLOCK, REPLACEMENT, SAMPLE = 1, 2, 3, 4
NEAR_ATTEMPTS = 4  # replacements drawn from the same block before the whole dataset is drawn from


def stream(seed: int, purpose: int, *coordinates: int) -> np.random.Generator:
    """Return the generator of (seed, purpose, up to three coordinates): the same numbers whoever asks, and when."""
    counter = [0, *coordinates, *[0] * (3 - len(coordinates))]  # the lowest word counts the draws
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=counter))


def dataset_seed(seed: int, name: str) -> int:
    """Return 63 bits from a run's seed and a dataset's name, so adding a dataset leaves the others' order as is."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


class Slot(NamedTuple):
    """One sample of the order."""

    epoch: int
    shard: int
    row: int


@dataclass(slots=True)
class Plan:
    """The order of one dataset.

    counts: usable samples of each shard. batch_size: samples of a global batch, a multiple of `lanes`. block: K.
    """

    counts: NDArray[np.int64]
    seed: int
    batch_size: int
    lanes: int
    block: int = 16
    total: int = field(init=False)  # N, valid samples in an epoch
    length: int = field(init=False)  # L, samples of a lane in an epoch
    drawn: int = field(init=False, default=0)  # numbers permuted so far: the work of locating samples
    _epochs: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = field(init=False, repr=False)
    _segments: OrderedDict[tuple[int, ...], NDArray[np.uint32]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.lanes < 1 or self.batch_size % self.lanes:
            raise UserError(f"batch size {self.batch_size} is not a multiple of the number of lanes, {self.lanes}")
        self.total = int(self.counts.sum())
        if self.total == 0:
            raise UserError("the dataset has no samples")
        self.length = -(-self.total // self.lanes)
        self._epochs, self._segments = OrderedDict(), OrderedDict()

    @property
    def per_lane(self) -> int:
        """Samples that each lane gives to a global batch."""
        return self.batch_size // self.lanes

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (order of the shards (S,), where each begins on the line (S + 1,))."""
        if epoch not in self._epochs:
            order = stream(self.seed, SHARDS, epoch).permutation(len(self.counts))
            self.drawn += len(order)
            self._epochs[epoch] = order, np.concatenate([[0], np.cumsum(self.counts[order])])
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _segment(self, epoch: int, lane: int, at: int) -> tuple[int, int]:
        """Return the [first, last) of the part of a lane that is permuted together with position `at` of the line."""
        starts = self._epoch(epoch)[1]
        lap, inside = divmod(at, self.total)
        k = (int(np.searchsorted(starts, inside, "right")) - 1) // self.block * self.block
        base = lap * self.total
        first = max(lane * self.length, base + int(starts[k]))
        last = min((lane + 1) * self.length, base + int(starts[min(k + self.block, len(self.counts))]))
        return first, last

    def _permutation(self, epoch: int, lane: int, first: int, last: int) -> NDArray[np.uint32]:
        key = (epoch, lane, first)
        if key not in self._segments:
            self._segments[key] = stream(self.seed, BLOCK, *key).permutation(last - first).astype(np.uint32)
            self.drawn += last - first
            while len(self._segments) > 2 * self.lanes:
                self._segments.popitem(last=False)
        self._segments.move_to_end(key)
        return self._segments[key]

    def _locate(self, epoch: int, at: int) -> Slot:
        order, starts = self._epoch(epoch)
        at %= self.total
        s = int(np.searchsorted(starts, at, "right")) - 1
        return Slot(epoch, int(order[s]), at - int(starts[s]))

    def at(self, lane: int, n: int) -> Slot:
        """Return sample number n of a lane, counted from the beginning of training."""
        epoch, offset = divmod(n, self.length)
        at = lane * self.length + offset
        first, last = self._segment(epoch, lane, at)
        return self._locate(epoch, first + int(self._permutation(epoch, lane, first, last)[at - first]))

    def segment_shards(self, lane: int, n: int) -> tuple[list[int], int]:
        """Return the shards in the block of sample n of a lane, and the n at which the next block begins."""
        epoch, offset = divmod(n, self.length)
        first, last = self._segment(epoch, lane, lane * self.length + offset)
        order, starts = self._epoch(epoch)
        inside = np.searchsorted(starts, [first % self.total, (last - 1) % self.total], "right") - 1
        return order[inside[0] : inside[1] + 1].tolist(), epoch * self.length + last - lane * self.length

    def place(self, slot: int, lane_position: int) -> tuple[int, int]:
        """Return (lane, n) of a slot of the global batch that starts after `lane_position` samples of each lane."""
        lane, inside = divmod(slot, self.per_lane)
        return lane, lane_position + inside

    def replacement(self, lane: int, n: int, attempt: int) -> Slot:
        """Return the replacement of a bad sample n of a lane: always the same one for the same attempt (from 1).

        The first attempts draw from the sample's own block, whose shards are open; later ones from the whole dataset.
        """
        epoch, offset = divmod(n, self.length)
        first, last = 0, self.total
        if attempt <= NEAR_ATTEMPTS:
            first, last = self._segment(epoch, lane, lane * self.length + offset)
        at = first + int(stream(self.seed, REPLACEMENT, lane, n, attempt).integers(last - first))
        return self._locate(epoch, at)


def default_lanes(batch_size: int) -> int:
    """Return as many lanes as divide the batch, at most 64, so that later runs may use any world size dividing it."""
    return math.gcd(batch_size, 64)
