"""Joins short rows into long ones, so that little of a batch is padding.

    rows      <image> a cat <EOC>      <image> dogs <EOC>        a b
    packed    <image> a cat <EOC> <image> dogs <EOC> a b
    sequence     1    1  1    1      2     2     2   3 3         0 is padding
    phi          1    1  1    1      2     2     2   0 0

Only the samples of one micro-batch are packed, so packing changes how a batch is laid out and not what is in it: order,
state and loss are those of the unpacked batch. Rows are filled evenly and are as long as the fullest one, not always
the limit, so even a batch of a few rows has little padding. The sequences of a row are isolated: self-attention and
positions by `sequence` (`flamingo.language.packing`), media attention by phi.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.batches.tokenize import IGNORED, TokenRow


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Several rows in one of T tokens: ids, phi, labels and sequence (T,) int64, and its number of images."""

    ids: NDArray[np.int64]
    phi: NDArray[np.int64]
    labels: NDArray[np.int64]
    sequence: NDArray[np.int64]
    images: int


def groups(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return which samples share a row of at most `size` tokens: few rows, filled evenly.

    The longest sample goes first, each into the emptiest row; a function of the lengths and their order alone.
    """
    if max(lengths) > size:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit a row of {size}")
    order = sorted(range(len(lengths)), key=lambda sample: -lengths[sample])
    rows = max(1, -(-sum(lengths) // size))
    while (filled := _spread(order, lengths, rows, size)) is None:
        rows += 1
    return sorted(sorted(row) for row in filled if row)


def _spread(order: Sequence[int], lengths: Sequence[int], rows: int, size: int) -> list[list[int]] | None:
    fills = [(0, row) for row in range(rows)]
    members: list[list[int]] = [[] for _ in range(rows)]
    for sample in order:
        fill, row = fills[0]
        if fill + lengths[sample] > size:
            return None  # it does not even fit the emptiest
        heapq.heapreplace(fills, (fill + lengths[sample], row))
        members[row].append(sample)
    return members


def join(rows: Sequence[TokenRow]) -> PackedRow:
    """Return rows joined into one. Nothing predicts a row's first token, so it has no label here either."""
    lengths = [len(row.ids) for row in rows]
    before = np.cumsum([0, *(len(row.images) for row in rows)])
    labels = np.concatenate([row.labels for row in rows])
    starts = np.cumsum([0, *lengths])[:-1]
    labels[starts[starts < len(labels)]] = IGNORED
    phi = np.concatenate([np.where(row.phi > 0, row.phi + n, 0) for row, n in zip(rows, before[:-1], strict=True)])
    sequence = np.repeat(np.arange(1, len(rows) + 1), lengths)
    return PackedRow(np.concatenate([row.ids for row in rows]), phi, labels, sequence, int(before[-1]))
