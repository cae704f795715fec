"""A folder of your own documents: Markdown or text files that show images, a document each.

    report.md     The first chart: ![](charts/1.png) shows the rise.

An image's path is relative to its file. A document with a missing image is dropped whole: your own documents are few,
and you can fix them.
"""

from __future__ import annotations

import argparse
import posixpath
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from data.prepare.images import ImageFolder, ImageRule, add_image_arguments
from data.prepare.inputs import folder_units, input_files
from data.prepare.units import Dropped, InputUnit, Tally
from data.shards.document import Document, Image, Text
from flamingo.errors import UserError

LAYOUT = "interleaved"
SUFFIXES = (".md", ".markdown", ".txt")
IMAGE_LINK = re.compile(r"""!\[[^\]\n]*\]\(\s*<?([^)>\n"]+?)>?(?:\s+"[^"\n]*")?\s*\)""")
IN_A_UNIT = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare folder`."""
    parser.add_argument("--min-images", type=int, default=0, help="documents with fewer are dropped (default 0)")
    add_image_arguments(parser)


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return units of a thousand documents."""
    result: list[InputUnit] = []
    for item in args.inputs:
        if not Path(item).is_dir():
            raise UserError(f"input {item} is not a folder; give the folder of the documents")
        names = [label for label, _ in input_files([item], SUFFIXES)]
        result += folder_units(item, names, IN_A_UNIT)
    return result


@lru_cache(maxsize=4)
def _folder(root: str) -> ImageFolder:
    return ImageFolder(root)


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield a document for each file."""
    rule, folder = ImageRule.of(args), _folder(unit.path)
    for name in unit.names:
        try:
            yield _document(name, folder, rule, args.min_images)
        except Dropped as dropped:
            tally.drop_document(dropped.reason, name)


def _document(name: str, folder: ImageFolder, rule: ImageRule, min_images: int) -> Document:
    try:
        parts = IMAGE_LINK.split(folder.read(name).decode("utf-8"))  # text, path, text, path, ...
    except UnicodeDecodeError:
        raise Dropped("document is not UTF-8") from None
    document = Document("", [], [], {"file": name})
    numbers: dict[str, int] = {}
    for number, part in enumerate(parts):
        if number % 2 == 0:
            if part.strip():
                document.nodes.append(Text(part.strip()))
            continue
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(part)))
        if path not in numbers:
            document.images.append(rule.check(folder.read(path)))
            numbers[path] = len(document.images) - 1
        document.nodes.append(Image((numbers[path],)))
    if not document.nodes:
        raise Dropped("empty document")
    if len(document.images) < min_images:
        raise Dropped(f"fewer than {min_images} images")
    return document
