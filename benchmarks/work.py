"""The work: prompts, class names and training rows, the same for both libraries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.sizes import Size
from flamingo.labels import IGNORED

SHOT_TOKENS = 8
"""Tokens of a demonstration, with those of its image and its end: <image> A photo of a ... <|endofchunk|>."""


@dataclass(frozen=True)
class Row:
    """One document or prompt: ids (T,), raw images (I, 3, S, S) uint8, labels (T,)."""

    ids: Tensor
    images: Tensor
    labels: Tensor


def image_id(size: Size) -> int:
    """Return the id of `<image>`, the first after the LM's vocabulary; `<|endofchunk|>` is the next."""
    return size.vocab


def row(size: Size, images: int, tokens: int, seed: int) -> Row:
    """Return a document with images at equal distances, each after an end-of-chunk; no loss on their tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, size.vocab, (tokens,), generator=generator)
    for position in (torch.arange(images) * tokens) // max(images, 1):
        ids[position] = image_id(size)
        if position:
            ids[position - 1] = image_id(size) + 1
    shape = (images, 3, size.image_size, size.image_size)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Row(ids, pixels, ids.masked_fill(ids == image_id(size), IGNORED))


def prompt(size: Size, shots: int) -> Row:
    """Return `shots` demonstrations and a query, each with an image."""
    return row(size, shots + 1, (shots + 1) * SHOT_TOKENS, seed=shots)


def class_names(size: Size) -> list[list[int]]:
    """Return answers of one to four tokens, as class names have; every fourth begins like the one before it."""
    generator = torch.Generator().manual_seed(1)
    names: list[list[int]] = []
    for index in range(size.names):
        length = (1, 2, 3, 2, 4)[index % 5]
        name = torch.randint(10, size.vocab, (length,), generator=generator).tolist()
        if index % 4 == 3 and length > 1:
            name[0] = names[-1][0]
        names.append(name)
    return names


def training_steps(size: Size) -> list[list[Row]]:
    """Return the rows of each step."""
    return [
        [row(size, count, size.tokens, seed=10 * step + index) for index, count in enumerate(counts)]
        for step, counts in enumerate(size.counts)
    ]
