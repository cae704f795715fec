"""Bytes of a picture to a uint8 RGB tensor, by one rule for training and evaluation.

The rule is `to_rgb`: EXIF rotation applied, transparency laid on white, 16 bit reduced to 8, the first frame of an
animation. What is notable: the size is checked in the header, before a bomb can unfold; a JPEG much larger than what
will be asked of it is decoded at a fraction of its size. Pillow does all of it: torchvision's decoders are up to a
third faster but deprecated since 0.29.
"""

from __future__ import annotations

import io
import struct

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.errors import ContentError
from data.page import sniff

MAX_PIXELS = 64_000_000
EXIF_ORIENTATION = 0x0112
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}  # no others are tried


def to_rgb(image: Image.Image) -> Tensor:
    """A Pillow image of any mode as uint8 (3, h, w)."""
    if image.mode == "RGB" and not image.info:  # the common case, without looking for what is not there
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bit grey, in the low half of 32 bits on some versions of Pillow
        grey = np.clip(np.asarray(image), 0, 65535) >> 8
        return torch.from_numpy(grey.astype(np.uint8)).expand(3, -1, -1).contiguous()
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, at_least: int | None = None) -> Tensor:
    """Decode a picture to uint8 (3, h, w).

    `at_least`: the side that will be asked of it later; a JPEG whose shorter side is 4 times that or more is decoded
    at a fraction of its size, never below 2 times. Raises ContentError for what is no picture, is damaged, or has more
    than `max_pixels` pixels.
    """
    kind = sniff(data)
    if kind is None:
        raise ContentError("not a picture", f"begins with {data[:16]!r}")
    try:
        with Image.open(io.BytesIO(data), formats=(FORMATS[kind],)) as image:
            if image.width * image.height > max_pixels:
                raise ContentError("too large", f"{image.width} x {image.height} pixels, the limit is {max_pixels}")
            if at_least is not None and min(image.size) >= 4 * at_least:
                image.draft("RGB", (2 * at_least, 2 * at_least))  # JPEG only, others ignore it
            return to_rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ContentError("too large", str(error)) from None
    except (OSError, RuntimeError, ValueError, SyntaxError, struct.error, EOFError) as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise ContentError("undecodable", f"{kind} of {len(data)} bytes: {detail[:200]}") from None
