"""Images as phones, scanners and editors leave them: one rule for what is read, every failure a counted fault."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.batches.decode import decode
from data.errors import ContentError
from data.prepare.images import ImageRule
from data.prepare.units import Dropped
from flamingo.vision import image_files
from flamingo.vision.image_files import FORMATS, sniff
from flamingo.vision.transform import MODES, ImageTransform, to_rgb
from tests.fixtures import encoded, random_image

PICTURE = random_image("RGB", (40, 30), seed=5)


def saved(form: str, image: Image.Image = PICTURE) -> bytes:
    if form == "HEIF":
        heif = pytest.importorskip("pillow_heif")
        heif.register_heif_opener()
    return encoded(image, form)


def exif(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """An EXIF block of entries (tag, type, count, value), in either byte order, whatever they are."""
    out, body = struct.pack(f"{order}H", len(entries)), b""
    after = 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries):
        if len(value) > 4:
            value, body = struct.pack(f"{order}I", after + len(body)), body + value + b"\0" * (len(value) % 2)
        out += struct.pack(f"{order}HHI", tag, kind, count) + value.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + mark + struct.pack(f"{order}I", 8) + out + bytes(4) + body


@pytest.mark.parametrize(("kind", "form"), FORMATS.items())
def test_every_format_is_read_by_training_and_by_prepare(kind: str, form: str) -> None:
    data = saved(form)
    assert sniff(data) == kind
    assert ImageRule(decode=True).check(data) == data
    decoded = decode(data)
    assert decoded.shape == (3, 30, 40)
    assert torch.equal(decoded, to_rgb(data))


def test_the_other_names_of_a_jpeg() -> None:
    data = encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE])  # what stereo cameras and phones write
    assert sniff(data) == "jpg"
    assert decode(data).shape == (3, 30, 40)


def test_heic_without_its_reader_is_a_counted_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved("HEIF")
    monkeypatch.setattr(image_files, "_heic_can_be_read", lambda: False)
    with pytest.raises(ContentError, match="install pillow-heif"):
        decode(data)
    with pytest.raises(Dropped, match="install pillow-heif"):
        ImageRule().check(data)


@pytest.mark.parametrize(
    "data",
    [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\xff\x0a\xfa\x1f", b"\0\0\0\x0cJXL \r\n\x87\n", b"8BPS\0\1"],
)
def test_formats_that_are_not_read_are_named_faults(data: bytes) -> None:
    with pytest.raises(ContentError, match="not an image"):
        decode(data)
    with pytest.raises(Dropped):
        ImageRule().check(data)


ODD = {
    "text for a rational": (0x11A, 2, 7, b"72 dpi\0"),
    "a rational over zero": (0x11A, 5, 1, struct.pack("<II", 1, 0)),
    "a date of bytes": (0x132, 1, 3, b"\xff\xfe\0"),
    "an offset beyond the end": (0x8769, 4, 1, struct.pack("<I", 1 << 30)),
    "a directory that is itself": (0x8769, 4, 1, struct.pack("<I", 8)),
    "a type that does not exist": (0x9000, 99, 5, b"\1\2\3\4"),
    "a count of four billion": (0x9286, 7, 0xFFFFFFFF, b"\0\0\0\0"),
    "a position of text": (0x8825, 2, 4, b"gps\0"),
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("odd", ODD)
def test_of_odd_exif_only_the_orientation_is_read(odd: str, form: str) -> None:
    block = exif((0x112, 3, 1, struct.pack("<H", 6)), ODD[odd])
    data = encoded(PICTURE, form, exif=block)
    for image in (decode(data), decode(data, spare=True)[:3], to_rgb(data)):
        assert image.shape == (3, 40, 30)  # a quarter to the right


@pytest.mark.parametrize(
    ("entry", "turned"),
    [
        ((0x112, 3, 1, struct.pack(">H", 6)), True),
        ((0x112, 4, 1, struct.pack(">I", 8)), True),
        ((0x112, 5, 1, struct.pack(">II", 6, 1)), True),
        ((0x112, 3, 1, struct.pack(">H", 0)), False),
        ((0x112, 3, 1, struct.pack(">H", 99)), False),
        ((0x112, 2, 4, b"six\0"), False),
        ((0x112, 3, 2, struct.pack(">HH", 6, 6)), True),
    ],
)
def test_orientations_of_every_type(entry: tuple[int, int, int, bytes], turned: bool) -> None:
    data = encoded(PICTURE, "JPEG", exif=exif(entry, order=">"))
    assert decode(data).shape == ((3, 40, 30) if turned else (3, 30, 40))


def test_exif_behind_the_pixels_of_a_png_is_read() -> None:
    data = encoded(PICTURE, "PNG")
    block = exif((0x112, 3, 1, struct.pack("<H", 6)))[6:]
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    assert decode(data[:-12] + chunk + data[-12:]).shape == (3, 40, 30)


def test_formats_that_turn_themselves_are_turned_once() -> None:
    assert decode(encoded(PICTURE, "TIFF", tiffinfo={0x112: 6})).shape == (3, 40, 30)
    turn = Image.Exif()
    turn[0x112] = 6
    assert decode(encoded(PICTURE, "AVIF", exif=turn)).shape == (3, 40, 30)


@pytest.mark.parametrize("where", ["profile", "text", "text behind the pixels", "international text"])
def test_large_metadata_does_not_cost_a_png(where: str) -> None:
    text = PngInfo()
    if where == "profile":
        data = encoded(PICTURE, "PNG", icc_profile=bytes(3 << 20))
    elif where == "text behind the pixels":
        body = b"note\0\0" + zlib.compress(bytes(3 << 20))
        chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
        data = encoded(PICTURE, "PNG")
        data = data[:-12] + chunk + data[-12:]
    else:
        add = text.add_text if where == "text" else text.add_itxt
        add("note", "x" * (3 << 20), zip=True)
        data = encoded(PICTURE, "PNG", pnginfo=text)
    assert ImageRule(decode=True).check(data) == data
    assert torch.equal(decode(data), decode(encoded(PICTURE, "PNG")))


SEGMENTS = {
    "a list of several images": b"\xff\xe2\0\x10MPF\0II*\0\x08\0\0\0\0\0",
    "Photoshop's": b"\xff\xed\0\x20Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\xff\xff",
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_damaged_segments_do_not_cost_a_jpeg(name: str) -> None:
    data, segment = encoded(PICTURE, "JPEG"), SEGMENTS[name]
    segment = segment.ljust(int.from_bytes(segment[2:4], "big") + 2, b"\0")
    assert torch.equal(decode(data[:2] + segment + data[2:]), decode(data))


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("F", (4, 4), 1.0), 255),
        (Image.new("F", (4, 4), float("nan")), 0),
        (Image.new("I;16", (4, 4), 65535), 255),
        (Image.new("I", (4, 4), 200), 200),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 255)), 0),
        (Image.new("LA", (4, 4), (0, 0)), 255),
    ],
)
def test_the_modes_of_tiffs(image: Image.Image, colour: int) -> None:
    assert decode(encoded(image, "TIFF"))[:, 0, 0].tolist() == [colour] * 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 3_000_000), (3_000_000, 1), (2, 400_000)])
def test_a_line_of_pixels_does_not_blow_up(mode: str, size: tuple[int, int]) -> None:
    line = torch.full((3, *size), 77, dtype=torch.uint8)
    square = ImageTransform(224, mode=mode)(line)
    assert square.shape == (3, 224, 224)
    assert (square == 77).any()


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]),
    edits=st.lists(st.tuples(st.integers(0, 4000), st.binary(max_size=6)), max_size=4),
    cut=st.integers(0, 4000),
)
def test_damage_of_any_kind_is_a_counted_fault(form: str, edits: list[tuple[int, bytes]], cut: int) -> None:
    data = bytearray(encoded(PICTURE, form))
    for at, new in edits:
        data[at % len(data) : at % len(data) + len(new)] = new
    raw = bytes(data[: max(4, len(data) - cut % 500)])
    for read, fault in ((decode, ContentError), (ImageRule(decode=True).check, Dropped)):
        with contextlib.suppress(fault):
            read(raw)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 20), st.integers(0, 99), st.binary(max_size=12))))
def test_exif_of_any_kind_does_not_cost_the_image(entries: list[tuple[int, int, int, bytes]]) -> None:
    data = encoded(PICTURE, "JPEG", exif=exif(*(entry for entry in entries if entry[0] != 0x112)))
    assert decode(data).shape[0] == 3
    assert io.BytesIO(data).read(2) == b"\xff\xd8"
