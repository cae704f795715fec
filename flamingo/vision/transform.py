"""Images of any kind to square uint8 tensors.

Uint8 all the way; an image is scaled with antialiasing on the uint8 tensor (within one grey level of
open_clip's PIL transform, at a third of its time), and the encoder normalises.

Letters: C channels (3, RGB), h and w the image's own size, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv  # type: ignore[import-untyped]

from flamingo.config import OPENAI_MEAN, OPENAI_STD
from flamingo.errors import UserError
from flamingo.vision.image_files import read_image, upright

LONGEST = 64  # long by short side beyond which "crop" cuts before it scales
MODES = ("squash", "crop", "pad", "pad_mean")
ImageInput = Any
"""PIL image, path, bytes of a file, (h, w, 3) uint8 array, (3, h, w) uint8 tensor; a list of them is a clip."""


@dataclass(frozen=True)
class ImageTransform:
    """Make an image `size` pixels square; `mean` and `std` are the encoder's, kept here for the record.

    `mode`: "squash" ignores the shape; "crop" scales the shorter side and keeps the centre; "pad" scales the longer
    side and fills with black, "pad_mean" with the encoder's mean (Flamingo; nothing, once it is normalised).
    """

    size: int
    mean: Sequence[float] = OPENAI_MEAN
    std: Sequence[float] = OPENAI_STD
    mode: str = "crop"
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"image mode {self.mode!r} must be one of {', '.join(MODES)}")
        if self.interpolation not in ("bicubic", "bilinear", "nearest"):
            raise UserError(f"interpolation {self.interpolation!r} must be bicubic, bilinear or nearest")
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))

    def __call__(self, image: UInt8[Tensor, "C h w"]) -> UInt8[Tensor, "C S S"]:
        """Return the square image."""
        height, width = image.shape[-2:]
        if (height, width) == (self.size, self.size):
            return image
        image = self._bounded(image)
        height, width = image.shape[-2:]
        target = [self.size, self.size]
        if self.mode != "squash":
            side = min(height, width) if self.mode == "crop" else max(height, width)
            target = [max(1, round(height * self.size / side)), max(1, round(width * self.size / side))]
        way = tv.InterpolationMode(self.interpolation)
        out = tv.resize(image, target, interpolation=way, antialias=self.interpolation != "nearest")
        if self.mode == "crop":
            out = tv.center_crop(out, [self.size, self.size])
        elif self.mode in ("pad", "pad_mean"):
            left, top = (self.size - target[1]) // 2, (self.size - target[0]) // 2
            mean = [round(255 * value) for value in self.mean]
            mean += [0] * (len(out) - len(mean))  # of a channel that only fills up the memory
            fill = mean if self.mode == "pad_mean" else 0
            out = tv.pad(out, [left, top, self.size - target[1] - left, self.size - target[0] - top], fill=fill)
        return out

    def _bounded(self, image: UInt8[Tensor, "C h w"]) -> UInt8[Tensor, "C h2 w2"]:
        """Return an image of which no line is so long that scaling it takes gigabytes; all but a few stay as they are.

        Of a line of pixels, "crop" would first make the shorter side `size`: only the middle of it is ever shown.
        """
        height, width = image.shape[-2:]
        longest = LONGEST * min(height, width)
        if self.mode == "crop" and max(height, width) > longest:
            image = tv.center_crop(image, [min(height, longest), min(width, longest)])
            height, width = image.shape[-2:]
        every = [-(-side // max(1 << 15, LONGEST * self.size)) for side in (height, width)]
        return image if every == [1, 1] else image[:, :: every[0], :: every[1]]

    @staticmethod
    def to_rgb(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
        """Return a PIL image as uint8 RGB: turned as its EXIF says, transparency on white, 16 bits scaled to 8."""
        image = upright(image)
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            values = np.nan_to_num(np.asarray(image).astype(np.float32))
            most = values.max(initial=0)
            scale = 1.0 if image.mode == "F" and most <= 1 else 255.0 if most <= 255 else 65535.0
            image = Image.fromarray((values * (255.0 / scale)).clip(0, 255).round().astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def to_rgb(image: ImageInput, where: str = "the image") -> UInt8[Tensor, "3 h w"]:
    """Return any kind of image as a uint8 RGB tensor.

    Raises:
        UserError: it cannot be decoded; `where` says which one.
    """
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise UserError(f"{where} is a {image.dtype} tensor {tuple(image.shape)}; uint8 (3, h, w) is needed")
        return image
    try:
        if isinstance(image, str | Path):
            image = Path(image).read_bytes()
        if isinstance(image, bytes | bytearray):
            return read_image(bytes(image), ImageTransform.to_rgb)
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            raise UserError(f"{where} is a {type(image).__name__}, not an image")
        return ImageTransform.to_rgb(image)
    except UserError:
        raise
    except Exception as error:  # decoders raise exceptions of every kind
        raise UserError(f"{where} cannot be decoded: {error}") from error
