"""MINT-1T's tars, and those that NeMo Curator writes: texts and images in one order, the images beside the JSON.

    {key}.json     {"texts": ["A text.", null], "images": [null, "page_0_image_85"], ...}
    {key}.tiff     MINT-1T: all images of the document as the frames of one file, in their order
    {key}.1.jpg    NeMo Curator: a file for each, named by `images` with the key or without it

A frame of a TIFF becomes a PNG, without loss; other images keep their bytes. MINT-1T's HTML part is parquet with URLs:
`prepare obelics` reads it.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

from PIL import Image as PILImage

from data.prepare.images import ImageRule, add_image_arguments
from data.prepare.inputs import file_units
from data.prepare.sources.obelics import documents_of, parts_of
from data.prepare.tars import TarSample, json_samples
from data.prepare.units import Dropped, InputUnit, Tally
from data.shards.document import Document
from flamingo.vision.image_files import read_image, sniff

LAYOUT = "interleaved"
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare mint`."""
    parser.add_argument("--min-images", type=int, default=1, help="documents with fewer are dropped (default 1)")
    add_image_arguments(parser)


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return a unit for each tar."""
    return file_units(args.inputs, (".tar",))


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield a document for each sample."""
    rule = ImageRule.of(args)
    for sample, body in json_samples(unit, tally):
        try:
            read = lru_cache(maxsize=1)(sample.read)  # of a file with all of a document's images
            files = _files(sample, body.get("images"), read)
            parts = parts_of(body, partial(_image, rule, files, read), sample.where, tally)
        except Dropped as dropped:
            tally.drop_document(dropped.reason, sample.where)
            continue
        meta = {name: body[name] for name in ("url", "pdf_name") if isinstance(body.get(name), str)}
        yield from documents_of(parts, meta, args.min_images, sample.where, tally)


Files = dict[int, tuple[str, int | None]]
"""By position: the suffix of the member that an image is in, and which frame of it."""
Read = Callable[[str], bytes]


def _files(sample: TarSample, names: Any, read: Read) -> Files:
    """Return where the image of each position is; positions whose image is in no file are left out.

    Raises:
        Dropped: a file of several frames has more or fewer than the positions that it would fill.
    """
    key = sample.key.rpartition("/")[2]
    found: Files = {}
    unnamed = []
    for index, name in enumerate(names if isinstance(names, list) else []):
        if not name:
            continue
        suffix = str(name).rpartition("/")[2].removeprefix(f"{key}.").lower()
        if suffix in sample.members:
            found[index] = suffix, None
        else:
            unnamed.append(index)
    named = {suffix for suffix, _ in found.values()}
    others = [suffix for suffix in sample.images() if suffix not in named]
    if unnamed and len(others) == 1:
        (suffix,) = others
        if _frames(read(suffix)) != len(unnamed):
            raise Dropped("the numbers of images and of frames differ")
        found |= {index: (suffix, frame) for frame, index in enumerate(unnamed)}
    return found


def _frames(data: bytes) -> int:
    try:
        return read_image(data, lambda image: int(getattr(image, "n_frames", 1))) if sniff(data) == "tif" else 1
    except Exception:  # decoders raise exceptions of every kind
        raise Dropped("image cannot be decoded") from None


def _image(rule: ImageRule, files: Files, read: Read, index: int, name: Any) -> bytes:
    """Return the bytes of the image at a position; a frame of a TIFF as PNG. Raises Dropped."""
    if index not in files:
        raise Dropped("image is missing")
    suffix, frame = files[index]
    data = read(suffix)
    if frame is None or sniff(data) != "tif":
        return rule.check(data)

    def as_png(image: PILImage.Image) -> bytes:
        image.seek(frame)
        rule.check_size(*image.size)  # of this frame, before it is decoded
        out = io.BytesIO()
        (image if image.mode in PNG_MODES else image.convert("RGB")).save(out, "PNG")
        return out.getvalue()

    try:
        png = read_image(data, as_png)
    except Dropped:
        raise
    except Exception:
        raise Dropped("image cannot be decoded") from None
    return rule.check(png)
