"""Images and a tokenizer for the tests of every area, made without the network.

Nothing heavy is imported before it is used: tests of images alone do without torch and transformers.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """Return an image as the bytes of a file in a format of Pillow."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(colour: int | Sequence[int], noise: int | np.random.Generator | None = None, side: int = 8) -> bytes:
    """Return a PNG of one colour, or of one shade of grey.

    Args:
        colour: (red, green, blue) or the value of all three, 0 to 255.
        noise: a seed or a generator for a little noise in each pixel, so that no two images are the same file.
        side: width and height in pixels.
    """
    pixels = np.broadcast_to(np.asarray(colour), (side, side, 3))
    if noise is not None:
        rng = np.random.Generator(np.random.Philox(key=noise)) if isinstance(noise, int) else noise
        pixels = (pixels + rng.integers(-20, 20, size=(side, side, 3))).clip(0, 255)
    return encoded(Image.fromarray(pixels.astype(np.uint8)), "PNG")


def random_image(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Return smooth random colours in a mode of Pillow."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


def byte_tokenizer(first: Sequence[str] = (), **names: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a byte and no merges.

    Args:
        first: tokens whose ids come before those of the bytes.
        names: `eos_token`, `pad_token`, ...; those not in `first` come after the bytes. By default `<eos>` and `<pad>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*first, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = names or {"eos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)
