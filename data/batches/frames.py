"""Images on their way into a batch: which frames of a clip, decoded, scaled, coloured and stacked."""

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
        """The image (C, h, w), both uint8, in the size that the encoder takes; each channel for itself."""


def load_image(raw: RawSample, number: int, transform: Transform) -> Tensor:
    """Image `number` of a sample as uint8 (3, S, S), in memory often as (S, S, 4). Raises ContentError."""
    size = transform.size
    image = decode(raw.image(number), at_least=size, spare=True)
    return (image if image.shape[1:] == (size, size) else transform(image))[:3]


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new tensor: what a collate's `empty` is, unless its batch is written into memory shared with the trainer."""
    return torch.empty(tuple(shape), dtype=dtype)


def image_bytes(images: int, size: int) -> int:
    """Bytes of so many images of `size` pixels a side."""
    return images * 3 * size * size


def stacked(frames: Sequence[Tensor], size: int, new: Callable[[Sequence[int], torch.dtype], Tensor]) -> Tensor:
    """Frames (3, S, S), however they lie in memory, one behind the other in a tensor made by `new`."""
    pixels = new((len(frames), 3, size, size), torch.uint8)
    for place, frame in zip(pixels, frames, strict=True):
        place.copy_(frame)
    return pixels


def jittered(frame: Tensor, strength: float, draws: Sequence[float]) -> Tensor:
    """A frame (3, S, S) uint8 with brightness, contrast and saturation times 1 - strength to 1 + strength.

    `draws` are three numbers in [0, 1), one for each. Contrast is around the mean grey, saturation around each pixel's.
    """
    brightness, contrast, saturation = (1 + strength * (2 * draw - 1) for draw in draws)
    weights = torch.tensor(GREY).view(3, 1, 1)
    pixels = frame.float() * brightness
    grey = (pixels * weights).sum(0, keepdim=True)
    pixels = grey + (pixels - grey) * saturation  # which leaves the grey as it is
    mean = grey.mean()
    return (mean + (pixels - mean) * contrast).round_().clamp_(0, 255).to(torch.uint8)


def clip_frames(image: Image, spec: DatasetSpec, random: np.random.Generator) -> list[int]:
    """Exactly `max_frames` frames: a run of a longer clip (from its start unless the window is random), or repeated.

    With a `frame_rate`, of a clip that says its own: every so many frames that the rate comes nearest.
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
