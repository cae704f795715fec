"""Decodes the bytes of an image to a uint8 RGB tensor, by one rule for training and evaluation.

The rule is `flamingo.vision.transform.ImageTransform.to_rgb`; a plain RGB image takes a shorter path to the same
result. The size is checked in the header, before a decompression bomb can unfold, and a JPEG much larger than needed is
decoded at a fraction of its size. Pillow does all of it: torchvision's decoders are up to a third faster but deprecated
since 0.29.
"""

from __future__ import annotations

import io
import struct

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.errors import ContentError
from data.shards.document import sniff
from data.shards.tar import LFS

MAX_PIXELS = 64_000_000
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}  # the only ones tried
NOT_PLAIN = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "transparency"}  # may rotate or hide pixels


def _to_rgb(image: Image.Image, spare: bool) -> Tensor:
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
    kind = sniff(data)
    if kind is None:
        what = "a Git-LFS pointer: fetch the file itself with git lfs pull" if data.startswith(LFS) else repr(data[:16])
        raise ContentError("not an image", f"begins with {what}" if what[0] == "b" else f"it is {what}")
    try:
        with Image.open(io.BytesIO(data), formats=(FORMATS[kind],)) as image:
            if image.width * image.height > max_pixels:
                raise ContentError("too large", f"{image.width} x {image.height} pixels, the limit is {max_pixels}")
            if at_least is not None and min(image.size) >= 4 * at_least:
                image.draft("RGB", (2 * at_least, 2 * at_least))  # JPEG only, others ignore it
            return _to_rgb(image, spare)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ContentError("too large", str(error)) from None
    except (OSError, RuntimeError, ValueError, SyntaxError, struct.error, EOFError) as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise ContentError("undecodable", f"{kind} of {len(data)} bytes: {detail[:200]}") from None
