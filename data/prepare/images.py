"""Reads images: from a folder that no name or link leads out of, or from base64; and judges them by their header."""

from __future__ import annotations

import argparse
import base64
import binascii
import os
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data.prepare.inputs import LFS
from data.prepare.units import Dropped
from data.shards.places import place
from flamingo.errors import UserError
from flamingo.vision.image_files import UnreadableFormat, read_image, sniff


def add_image_arguments(parser: argparse.ArgumentParser, *, min_side: int = 1, max_aspect: float = 20.0) -> None:
    """Add the options that decide which images are kept."""
    parser.add_argument("--min-side", type=int, default=min_side, metavar="PX", help=f"(default {min_side})")
    parser.add_argument("--max-pixels", type=int, default=64_000_000, metavar="N", help="(default 64 million)")
    parser.add_argument(
        "--max-aspect", type=float, default=max_aspect, help=f"long by short side (default {max_aspect})"
    )
    parser.add_argument("--min-bytes", type=int, default=0, metavar="N", help="smallest file (open_flamingo: 10000)")
    parser.add_argument("--decode", action="store_true", help="decode every image and leave out damaged ones")


@dataclass(frozen=True, slots=True)
class ImageRule:
    """Which images are kept. With `plain`, also those of a single colour."""

    min_side: int = 1
    max_side: int = 1 << 30
    max_pixels: int = 64_000_000
    max_aspect: float = 20.0
    min_bytes: int = 0
    decode: bool = False
    plain: bool = True

    @classmethod
    def of(cls, args: argparse.Namespace, **fixed: Any) -> ImageRule:
        """Return the rule given on the command line. Raises UserError for invalid limits."""
        if args.min_side < 1 or args.max_pixels < 1 or args.max_aspect < 1:
            raise UserError("--min-side, --max-pixels and --max-aspect must be at least 1")
        return cls(
            **(
                {
                    "min_side": args.min_side,
                    "max_pixels": args.max_pixels,
                    "max_aspect": args.max_aspect,
                    "min_bytes": args.min_bytes,
                    "decode": args.decode,
                }
                | fixed
            )
        )

    def check(self, data: bytes) -> bytes:
        """Return an image's bytes unchanged. Raises Dropped with the first reason against it."""
        if sniff(data) is None:
            raise Dropped(_what_it_is(data))
        if len(data) < self.min_bytes:
            raise Dropped(f"image of fewer than {self.min_bytes} bytes")
        try:
            width, height = read_image(data, lambda image: image.size)
        except UnreadableFormat as error:
            raise Dropped(str(error)) from None
        except Image.DecompressionBombError:
            raise Dropped(f"image of more than {self.max_pixels} pixels") from None
        except Exception:  # decoders raise all kinds of exceptions for foreign bytes
            raise Dropped("image cannot be decoded") from None
        self.check_size(width, height)
        if self.decode or not self.plain:
            self._look(data)
        return data

    def check_size(self, width: int, height: int) -> None:
        """Raise Dropped for an image of a size that is not kept."""
        short, long = sorted((width, height))
        if width * height > self.max_pixels:
            raise Dropped(f"image of more than {self.max_pixels} pixels")
        if short < self.min_side:
            raise Dropped(f"image with a side below {self.min_side} pixels")
        if long > self.max_side:
            raise Dropped(f"image with a side above {self.max_side} pixels")
        if long > short * self.max_aspect:
            raise Dropped(f"image longer than {self.max_aspect:g} times its width")

    def _look(self, data: bytes) -> None:
        def extremes_of(image: Image.Image) -> Any:
            if not self.decode:
                image.draft("L", (64, 64))  # a JPEG is decoded at an eighth of its size; others ignore this
            return image.convert("RGB").getextrema()

        try:
            extremes = read_image(data, extremes_of)
        except Exception:
            raise Dropped("image cannot be decoded") from None
        if not self.plain and all(low == high for low, high in extremes):
            raise Dropped("image of a single colour")


def _what_it_is(data: bytes) -> str:
    if not data:
        return "image is an empty file"
    if data.startswith(LFS):
        return "image is a Git-LFS pointer"
    return "HTML saved as an image" if data.lstrip()[:1] == b"<" else "not an image"


class ImageFolder:
    """Images by their path below a folder, also of a store. No name or link leads out of it."""

    def __init__(self, root: str | Path) -> None:
        self.root = place(root)
        if not self.root.is_dir():
            raise UserError(f"image folder {root} does not exist; correct --images")
        self._real = str(self.root.resolve()) if isinstance(self.root, Path) else str(self.root)

    def is_inside(self, name: str) -> bool:
        """Return whether an absolute path, as open_clip's tables have them, is one below the folder as it was given."""
        if not isinstance(self.root, Path):
            return False
        path = os.path.normpath(name)
        return any(os.path.commonpath([path, root]) == root for root in (str(self.root.absolute()), self._real))

    def read(self, *names: str) -> bytes:
        """Return the bytes of the first of these files that exists. Raises Dropped."""
        for name in names:
            if not _can_be_a_name(name):
                continue
            inside = os.path.isabs(name) and self.is_inside(name)  # noqa: PTH117
            if not inside and (os.path.isabs(name) or ".." in name.replace("\\", "/").split("/")):  # noqa: PTH117
                raise Dropped("image's name leads out of its folder")
            if not isinstance(self.root, Path):
                try:
                    return (self.root / posixpath.normpath(name.removeprefix(f"{self.root}/"))).read_bytes()
                except FileNotFoundError:
                    continue
            path = self.root / name
            try:
                real = os.path.realpath(path)
                if os.path.commonpath([real, self._real]) != self._real:
                    raise Dropped("image is a link out of its folder")
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except IsADirectoryError:
                raise Dropped("image is a folder") from None
            except OSError as error:
                if error.errno == 36:  # ENAMETOOLONG
                    raise Dropped("image is missing") from None
                raise UserError(f"{path} cannot be read ({error.strerror})") from None
        raise Dropped("image is missing")


def _can_be_a_name(name: str) -> bool:
    """Return whether this can be a file's name: no NUL, no half surrogate pair."""
    try:
        return "\0" not in name and bool(os.fsencode(name))
    except UnicodeEncodeError:
        return False


def from_base64(text: Any) -> bytes:
    """Return an image from base64 in either alphabet, also written as `b'...'` or `data:image/png;base64,...`.

    Raises Dropped for anything else.
    """
    if not isinstance(text, str) or not text:
        raise Dropped("image is missing" if text in (None, "") else "image's base64 is not a string")
    if text.startswith("data:") and "," in text:
        text = text.partition(",")[2]
    if text[:2] in ("b'", 'b"') and text[-1] == text[1]:
        text = text[2:-1]  # str() of Python's bytes, a common mistake
    text = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise Dropped("image's base64 cannot be read") from None
