"""Image files: which formats are read, what their files are called, and how one is opened.

One rule for training, `generate`, evaluation and `python -m data prepare`. The format is what the first bytes say,
never the name. Of the metadata only the orientation is used, and metadata that cannot be read costs no image.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from typing import TypeVar

from PIL import Image, ImageFile

T = TypeVar("T")
FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": "TIFF",
    "avif": "AVIF",
    "heic": "HEIF",
}
"""Extension to Pillow's name of the format; decoders of other formats are never tried."""
NAMES = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
_SUFFIXES = """
    png apng jpg jpeg jpe jfif jfi jif pjpeg pjp mpo webp gif bmp dib tif tiff avif avifs heic heics heif heifs hif
    jp2 j2k jpf jpx jxl jxr svg ico tga psd ppm pgm pbm pnm exr dng cr2 nef arw dcm
"""
SUFFIXES = frozenset(_SUFFIXES.split())
"""What files of images are called, those too that cannot be read: they are counted, never taken for something else."""
_AVIF = frozenset((b"avif", b"avis"))
_HEIC = frozenset((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"))
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableFormat(ValueError):  # noqa: N818 (a description of the file)
    """A file that is an image of a format which is not read here, or no image at all."""


def sniff(data: bytes) -> str | None:
    """Return the file extension that matches an image's bytes, or None for an unknown format."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tif"
    if data[4:8] == b"ftyp":
        box = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
        brands = {box[at : at + 4] for at in range(0, len(box) - 3, 4) if at != 4}  # at 4 is a version
        return "avif" if brands & _AVIF else "heic" if brands & _HEIC else None
    return "bmp" if data[:2] == b"BM" else None


@cache
def _heic_can_be_read() -> bool:
    """Register the optional reader of HEIC with Pillow, once in a process."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def read_image(data: bytes, use: Callable[[Image.Image], T]) -> T:
    """Open an image and return what `use` makes of it, such as its size or its pixels.

    When that fails and there is metadata that an image does without (profiles, comments, whole EXIF blocks), it is
    tried again without.

    Raises:
        UnreadableFormat: the first bytes are not those of a format that can be read.
        Exception: whatever the decoder raises for damaged files, which is of every kind, or `use` raises.
    """
    kind = sniff(data)
    if kind is None:
        raise UnreadableFormat(f"begins with {data[:16]!r}")
    if kind == "heic" and not _heic_can_be_read():
        raise UnreadableFormat("a HEIC image: install pillow-heif (pip install 'flamingo-vlm[heif]')")
    first: Exception | None = None
    for attempt in chain([data], _without_metadata(data, kind)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, of odd metadata: one for each image
                with Image.open(io.BytesIO(attempt), formats=(FORMATS[kind],)) as image:
                    return use(image)
        except Exception as error:  # decoders raise exceptions of every kind
            first = first or error
    assert first is not None
    raise first


def _without_metadata(data: bytes, kind: str) -> Iterator[bytes]:
    """Yield a file without some of its metadata, then without more of it, where it has any."""
    if kind == "png":
        bare = b"".join(_png_chunks(data, (b"tEXt", b"zTXt", b"iTXt", b"iCCP")))
        if len(bare) < len(data):
            yield bare
    if kind != "jpg":
        return
    size = len(data)
    for dropped in ((*range(0xE2, 0xEE), 0xEF, 0xFE), (*range(0xE1, 0xEE), 0xEF, 0xFE)):  # all but EXIF; EXIF too
        bare = b"".join(_jpeg_segments(data, dropped))
        if len(bare) < size:
            size = len(bare)
            yield bare


def _png_chunks(data: bytes, dropped: tuple[bytes, ...]) -> Iterator[bytes]:
    yield data[:8]
    at = 8
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        if name not in dropped:
            yield data[at : at + length + 12]
        at += length + 12


def _jpeg_segments(data: bytes, dropped: tuple[int, ...]) -> Iterator[bytes]:
    """Yield the segments of a JPEG up to its scan, those with a dropped marker left out, and all that follows."""
    yield data[:2]
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in (0xDA, 0xFF):
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] not in dropped:
            yield data[at:end]
        at = end
    yield data[at:]


def refuse_unread(image: Image.Image) -> None:
    """Refuse an opened file whose pixels would only now be read by a decoder that is not one of `FORMATS`.

    Pillow hands some formats to other programs, PostScript to Ghostscript. An image that was loaded, or made in memory,
    is what it is.

    Raises:
        UnreadableFormat: its format is not read here.
    """
    pixels = vars(image).get("_im", vars(image).get("im"))  # its name since Pillow 11, and before
    waits = isinstance(image, ImageFile.ImageFile) and (bool(image.tile) or pixels is None)
    if waits and image.format not in (*FORMATS.values(), "MPO"):  # MPO: a JPEG with more images behind it
        raise UnreadableFormat(f"a file of format {image.format}, which is not read; {NAMES} is")


def upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF says. Nothing else of the EXIF is read, so nothing else can be wrong in it."""
    image.load()  # a PNG may have it after the pixels; a TIFF is turned while it is loaded
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a block that cannot be read, or a value of a type that is none
        return image
    return image if turn is None else image.transpose(turn)
