"""Images of any kind to square uint8 tensors.

Uint8 all the way; an image is scaled with antialiasing on the uint8 tensor (within one grey level of
open_clip's PIL transform, at a third of its time), and the encoder normalises.

Letters: C channels (3, RGB), h and w the image's own size, S side in pixels.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse
from urllib.request import Request

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv  # type: ignore[import-untyped]

from flamingo.constants import OPENAI_MEAN, OPENAI_STD
from flamingo.errors import UserError
from flamingo.redirects import IMAGE_HOSTS, urlopen
from flamingo.vision.image_files import read_image, refuse_unread, upright

LONGEST = 64  # long by short side beyond which "crop" cuts before it scales
MODES = ("squash", "crop", "pad", "pad_mean")
ImageInput = Any
"""PIL image, path, URL, base64 text, bytes of a file, uint8 array or tensor of 1 to 3 (arrays: 4) channels in front or
at the end; a list of them is a clip."""
FETCH_SECONDS = 20.0
"""How long a URL may take to answer, and after which its bytes are expected to come at `SLOWEST` bytes a second."""
SLOWEST = 10_000
FETCH_BYTES = 1 << 30
"""Longest file that is fetched; clips are files, too."""


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
        refuse_unread(image)
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
        UserError: it cannot be fetched or decoded; `where` says which one.
    """
    if isinstance(image, Tensor):
        return _tensor_to_rgb(image, where)
    try:
        if isinstance(image, str):
            image = read_source(image, where)
        if isinstance(image, Path):
            where = f"{where} ({image})"
            if image.exists() and not image.is_file():  # a pipe would be waited for, a device has no end
                raise UserError(f"{where} is not a file")
            image = image.read_bytes()
        if isinstance(image, bytes | bytearray):
            return read_image(bytes(image), ImageTransform.to_rgb)
        if isinstance(image, np.ndarray):
            image = _array_to_pil(image, where)
        if not isinstance(image, Image.Image):
            raise UserError(f"{where} is a {type(image).__name__}, not an image")
        if 0 in image.size:
            raise UserError(f"{where} has no pixels: it is {image.width} x {image.height}")
        return ImageTransform.to_rgb(image)
    except UserError:
        raise
    except Exception as error:  # decoders raise exceptions of every kind
        raise UserError(f"{where} cannot be decoded: {error}") from error


def as_seen(image: ImageInput, where: str = "the image") -> Image.Image:
    """Return any kind of image as the RGB image that a model sees, before it is scaled. Raises as `to_rgb`."""
    return Image.fromarray(to_rgb(image, where).permute(1, 2, 0).numpy())


def read_source(source: str, where: str = "the image") -> bytes | Path:
    """Return what a URL, a `file:` or `data:` URL or base64 text holds; any other text is a path.

    Raises:
        UserError: the URL cannot be fetched or decoded, or its server sends it on to a host that is not allowed.
    """
    if source.startswith(("http://", "https://")):
        return _fetch(source, where)
    if source.startswith("file://"):
        return Path(unquote(urlparse(source).path))
    if source.startswith("data:"):
        try:
            return base64.b64decode(source.partition(",")[2])
        except ValueError as error:
            raise UserError(f"{where} is a data: URL that is not base64 ({error})") from error
    # A path is as a rule shorter than any image in base64, and no path is longer than 4096 bytes.
    if len(source) > 64 and (len(source) > 4096 or not os.path.exists(source)):  # noqa: PTH110 (which may raise)
        with suppress(ValueError):
            return base64.b64decode(source, validate=True)
    return Path(source)


def _fetch(url: str, where: str) -> bytes:
    """Return what a URL holds; a server that drips or sends without end is cut off."""
    begun, parts, size = time.monotonic(), [], 0
    try:
        allowing = "flamingo.redirects.IMAGE_HOSTS.add({!r})"
        with urlopen(Request(url), IMAGE_HOSTS, FETCH_SECONDS, f"{where}:", allowing) as answer:
            while part := answer.read1(1 << 20):
                parts.append(part)
                size += len(part)
                seconds = time.monotonic() - begun
                if seconds > FETCH_SECONDS and size < SLOWEST * seconds:
                    raise OSError(f"{size} bytes in {seconds:.0f} s, less than {SLOWEST} a second")
                if size > FETCH_BYTES:
                    raise OSError(f"it is longer than {FETCH_BYTES} bytes")
            if answer.length:
                raise OSError(f"the connection was closed {answer.length} bytes before its end")
    except UserError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{where}: {url} cannot be fetched ({reason}); give a file, bytes or a PIL image") from error
    return b"".join(parts)


def _tensor_to_rgb(image: Tensor, where: str) -> UInt8[Tensor, "3 h w"]:
    planes = image[None] if image.ndim == 2 else image
    if planes.ndim == 3 and planes.shape[0] not in (1, 3) and planes.shape[2] in (1, 3):
        planes = planes.permute(2, 0, 1)
    if 0 in image.shape:
        raise UserError(f"{where} has no pixels: it is a tensor of shape {tuple(image.shape)}")
    if image.dtype != torch.uint8 or planes.ndim != 3 or planes.shape[0] not in (1, 3):
        raise UserError(f"{where} is a {image.dtype} tensor {tuple(image.shape)}; uint8 (3, h, w) is needed")
    return planes.expand(3, -1, -1) if planes.shape[0] == 1 else planes


def _array_to_pil(image: NDArray[Any], where: str) -> Image.Image:
    if 0 in image.shape:
        raise UserError(f"{where} has no pixels: it is an array of shape {image.shape}")
    if np.issubdtype(image.dtype, np.floating) and not np.isfinite(image).all():
        raise UserError(f"{where} is an array with NaN or infinite values")
    if image.ndim == 3 and image.shape[2] > 4 and image.shape[0] in (1, 3, 4):
        image = np.moveaxis(image, 0, 2)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim == 3 and image.dtype != np.uint8:
        raise UserError(f"{where} is a {image.dtype} array {image.shape}; uint8 (h, w, 3) from 0 to 255 is needed")
    return Image.fromarray(np.ascontiguousarray(image))
