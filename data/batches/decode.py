"""Decodes the bytes of an image to a uint8 RGB tensor, by the rule of the whole library, large JPEGs at reduced size.

The rule is `flamingo.vision.transform.ImageTransform.to_rgb`; a plain RGB image takes a shorter path to the same
result. The size is checked in the header, before a decompression bomb can unfold, and a JPEG much larger than needed is
decoded at a fraction of its size. Pillow does all of it: torchvision's decoders are up to a third faster but deprecated
since 0.29.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from data.dataset import DatasetSpec
from data.errors import ContentError, warn
from data.shards.document import Image
from data.shards.reader import RawSample
from data.shards.tar import LFS
from flamingo.vision.image_files import UnreadableFormat, read_image, sniff

MAX_PIXELS = 64_000_000
ADDRESS = re.compile(r" ?<_io\.BytesIO object at \w+>")  # in Pillow's messages; another one in every process
NOT_PLAIN = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "transparency"}  # may rotate or hide pixels


def _to_rgb(image: PILImage.Image, spare: bool) -> Tensor:
    image.load()  # some of the metadata may follow the pixels
    if image.mode == "RGB" and NOT_PLAIN.isdisjoint(image.info):
        if not spare:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        pixels = bytearray(image.tobytes("raw", "RGBX"))  # as Pillow has it in memory: nothing is rearranged
        return torch.frombuffer(pixels, dtype=torch.uint8).view(image.height, image.width, 4).permute(2, 0, 1)
    from flamingo.vision.transform import ImageTransform  # brings transformers along: only where it is needed

    return ImageTransform.to_rgb(image)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, at_least: int | None = None, spare: bool = False) -> Tensor:
    """Decode an image to uint8 (3, h, w).

    With `spare` there may be a meaningless fourth channel, in memory laid out as (h, w, 4): torch resizes that twice as
    fast as three channels.

    `at_least`: the side needed later; a JPEG whose shorter side is at least 4 times that is decoded at a fraction of
    its size, but at least 2 times. Raises ContentError for what is not an image, is damaged, or has more than
    `max_pixels` pixels.
    """
    if sniff(data) is None and data.startswith(LFS):
        raise ContentError("not an image", "it is a Git-LFS pointer: fetch the file itself with git lfs pull")

    def pixels(image: PILImage.Image) -> Tensor:
        if image.width * image.height > max_pixels:
            raise ContentError("too large", f"{image.width} x {image.height} pixels, the limit is {max_pixels}")
        if at_least is not None and min(image.size) >= 4 * at_least:
            image.draft("RGB", (2 * at_least, 2 * at_least))  # JPEG only, others ignore it
        return _to_rgb(image, spare)

    try:
        return read_image(data, pixels)
    except ContentError:
        raise
    except UnreadableFormat as error:
        raise ContentError("not an image", str(error)) from None
    except PILImage.DecompressionBombError as error:
        raise ContentError("too large", str(error)) from None
    except Exception as error:  # decoders raise exceptions of every kind
        detail = ADDRESS.sub("", " ".join(str(error).split())) or type(error).__name__
        raise ContentError("undecodable", f"{sniff(data)} of {len(data)} bytes: {detail[:200]}") from None


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


@cache  # once
def _say_that_clips_are_cut(name: str) -> None:
    warn(
        f"dataset {name!r} holds clips, and max_frames=1 keeps one frame of each; set data.datasets.{name}.max_frames "
        "to show more (images then repeat themselves)"
    )


def clip_frames(image: Image, spec: DatasetSpec, random: np.random.Generator) -> list[int]:
    """Return exactly `max_frames` frames: a crop of a longer clip, or a shorter one with its last frame repeated.

    With a `frame_rate`, a clip with a known rate is thinned to every n-th frame, n as close to that rate as possible.
    A clip that is cut to one frame is said on stderr, once for a dataset in each process.
    """
    frames = list(image.frames)
    if len(frames) > 1 == spec.max_frames:
        _say_that_clips_are_cut(spec.name)
    every = 1
    if spec.frame_rate and isinstance(image.fps, int | float) and 0 < image.fps < 1e6:
        every = max(1, round(image.fps / spec.frame_rate))
    reach = (spec.max_frames - 1) * every + 1  # from the first to the last of the frames taken
    if len(frames) > reach:
        start = int(random.integers(len(frames) - reach + 1)) if spec.crop == "random" else 0
        return frames[start : start + reach : every]
    frames = frames[::every]
    return frames + frames[-1:] * (spec.max_frames - len(frames))
