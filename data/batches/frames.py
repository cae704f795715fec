"""Images on their way into a batch: frames are chosen, decoded, resized, jittered and stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.batches.decode import decode
from data.dataset import DatasetSpec
from data.shards.document import Image
from data.shards.reader import RawSample

GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's


class Transform(Protocol):
    """An image of any size to (3, S, S); `flamingo.processor.ImageTransform`."""

    @property
    def size(self) -> int:
        """S, in pixels."""

    def __call__(self, image: Tensor, /) -> Tensor:
        """Return an image (C, h, w) uint8 as (C, S, S) uint8, each channel on its own."""


def load_image(raw: RawSample, number: int, transform: Transform) -> Tensor:
    """Return image `number` of a sample as uint8 (3, S, S), in memory often as (S, S, 4). Raises ContentError."""
    size = transform.size
    image = decode(raw.image(number), at_least=size, spare=True)
    return (image if image.shape[1:] == (size, size) else transform(image))[:3]


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a new tensor: a collate's `empty`, unless its batch is written into memory shared with the trainer."""
    return torch.empty(tuple(shape), dtype=dtype)


def image_bytes(images: int, size: int) -> int:
    """Return the bytes of this many images of `size` pixels a side."""
    return images * 3 * size * size


def stacked(frames: Sequence[Tensor], size: int, new: Callable[[Sequence[int], torch.dtype], Tensor]) -> Tensor:
    """Return frames (3, S, S), whatever their memory layout, as one tensor (N, 3, S, S) made by `new`."""
    pixels = new((len(frames), 3, size, size), torch.uint8)
    for target, frame in zip(pixels, frames, strict=True):
        target.copy_(frame)
    return pixels


def jittered(frame: Tensor, strength: float, draws: Sequence[float]) -> Tensor:
    """Return a frame (3, S, S) uint8 with brightness, contrast and saturation times 1 - strength to 1 + strength.

    `draws` are three numbers in [0, 1), one for each. Contrast is relative to the mean grey, saturation to each
    pixel's.
    """
    brightness, contrast, saturation = (1 + strength * (2 * draw - 1) for draw in draws)
    weights = torch.tensor(GREY).view(3, 1, 1)
    pixels = frame.float() * brightness
    grey = (pixels * weights).sum(0, keepdim=True)
    pixels = grey + (pixels - grey) * saturation  # which leaves the grey as it is
    mean = grey.mean()
    return (mean + (pixels - mean) * contrast).round_().clamp_(0, 255).to(torch.uint8)


def clip_frames(image: Image, spec: DatasetSpec, random: np.random.Generator) -> list[int]:
    """Return exactly `max_frames` frames: a crop of a longer clip, or a shorter one with its last frame repeated.

    With a `frame_rate`, a clip with a known rate is thinned to every n-th frame, n as close to that rate as possible.
    """
    frames = list(image.frames)
    every = 1
    if spec.frame_rate and isinstance(image.fps, int | float) and 0 < image.fps < 1e6:
        every = max(1, round(image.fps / spec.frame_rate))
    reach = (spec.max_frames - 1) * every + 1  # from the first to the last of the frames taken
    if len(frames) > reach:
        start = int(random.integers(len(frames) - reach + 1)) if spec.crop == "random" else 0
        return frames[start : start + reach : every]
    frames = frames[::every]
    return frames + frames[-1:] * (spec.max_frames - len(frames))
