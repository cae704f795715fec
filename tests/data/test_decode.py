"""Images of every mode to RGB by one rule, and what cannot be decoded as a named error."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data.batches.decode import decode
from data.errors import ContentError
from flamingo.vision.transform import MODES, ImageTransform, to_rgb
from tests.fixtures import encoded, random_image


def as_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_plain_modes(mode: str) -> None:
    image = random_image(mode, (13, 9))
    decoded = decode(encoded(image, "PNG"))
    assert decoded.shape == (3, 9, 13)
    assert decoded.dtype == torch.uint8
    assert decoded.is_contiguous()
    assert np.array_equal(decoded.numpy(), as_array(image))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF"])
def test_transparency_becomes_white(form: str) -> None:
    image = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 3, 4))
    decoded = decode(encoded(image, form, **({"lossless": True} if form == "WEBP" else {})))
    assert decoded[:, 0, 0].tolist() == [0, 0, 255]
    assert decoded[:, 0, 5].tolist() == [255, 255, 255]


def test_half_transparent_grey() -> None:
    assert decode(encoded(Image.new("LA", (2, 2), (0, 128)), "PNG"))[:, 0, 0].tolist() == [127, 127, 127]


def test_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.putpixel((1, 0), 1)
    decoded = decode(encoded(image, "PNG", transparency=0))
    assert decoded[:, 0].T.tolist() == [[255, 255, 255], [200, 0, 0]]


def test_sixteen_bits_keep_their_upper_half() -> None:
    image = Image.fromarray(np.array([[0, 257 * 7, 65535]], dtype=np.uint16))
    assert decode(encoded(image, "PNG"))[0].tolist() == [[0, 7, 255]]


def test_cmyk_jpeg() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = decode(encoded(image, "JPEG"))[:, 4, 4].tolist()
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_exif_rotation_is_applied(form: str) -> None:
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    decoded = decode(encoded(image, form, exif=exif))
    assert decoded.shape == (3, 16, 8)
    assert decoded[:, :6].min() > 200  # now the upper half
    assert decoded[:, 10:].max() < 50


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_the_rule_is_the_processors(mode: str) -> None:
    image = random_image(mode, (31, 17), seed=3)
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    assert torch.equal(decode(data), to_rgb(data))


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[:, 0, 0].tolist() == [255, 0, 0]


def test_large_jpegs_are_decoded_small_enough_and_not_too_small() -> None:
    data = encoded(random_image("RGB", (800, 640)), "JPEG", quality=95)
    whole = decode(data)
    small = decode(data, at_least=40)
    assert 80 <= min(small.shape[1:]) <= 160
    resized = torch.nn.functional.interpolate(whole[None].float(), small.shape[1:], mode="area")[0]
    assert (resized - small).abs().mean() < 2
    assert decode(data, at_least=200).shape == whole.shape


def bomb(width: int, height: int) -> bytes:
    def chunk(tag: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_001, 12_000, 60_000])
def test_size_is_limited_before_decoding(side: int) -> None:
    with pytest.raises(ContentError) as caught:
        decode(bomb(side, side))
    assert caught.value.reason == "too large"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_cut_images_are_undecodable(form: str) -> None:
    data = encoded(random_image("RGB", (40, 40)), form)
    for cut in (20, len(data) // 2):
        with pytest.raises(ContentError) as caught:
            decode(data[:cut])
        assert caught.value.reason == "undecodable"


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_image(data: bytes) -> None:
    with pytest.raises(ContentError, match="not an image"):
        decode(data)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(61, 40), (40, 61), (24, 24), (20, 9)])
def test_a_spare_channel_changes_no_pixel(mode: str, size: tuple[int, int]) -> None:
    transform = ImageTransform(24, mode=mode)
    for form, image in (("JPEG", random_image("RGB", size)), ("PNG", random_image("L", size))):
        data = encoded(image, form)
        wide = decode(data, spare=True)
        assert len(wide) == (4 if form == "JPEG" else 3)
        slow = decode(data)
        assert torch.equal(wide[:3], slow)
        assert torch.equal(transform(wide)[:3], transform(slow))
