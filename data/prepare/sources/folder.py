"""A folder of one's own documents: Markdown or text files with pictures in them, a page each.

    report.md     The first chart: ![](charts/1.png) shows the rise.

A picture's path begins at its document. Where a picture is missing the whole document is dropped: one's own documents
are few, and their author can mend them.
"""

from __future__ import annotations

import argparse
import posixpath
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from data.prepare.images import PictureFolder, PictureRule, add_picture_arguments
from data.prepare.inputs import folder_units, input_files
from data.prepare.units import Dropped, Tally, Unit
from data.shards.document import Page, Picture, Text
from flamingo.errors import UserError

LAYOUT = "interleaved"
SUFFIXES = (".md", ".markdown", ".txt")
PLACE = re.compile(r"""!\[[^\]\n]*\]\(\s*<?([^)>\n"]+?)>?(?:\s+"[^"\n]*")?\s*\)""")
IN_A_UNIT = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m data prepare folder`."""
    parser.add_argument("--min-images", type=int, default=0, help="documents with fewer are dropped (default 0)")
    add_picture_arguments(parser)


def units(args: argparse.Namespace) -> list[Unit]:
    """Some thousand documents each."""
    found: list[Unit] = []
    for item in args.inputs:
        if not Path(item).is_dir():
            raise UserError(f"input {item} is no folder; give the folder of the documents")
        names = [label for label, _ in input_files([item], SUFFIXES)]
        found += folder_units(item, names, IN_A_UNIT)
    return found


@lru_cache(maxsize=4)
def _folder(root: str) -> PictureFolder:
    return PictureFolder(root)


def pages(unit: Unit, args: argparse.Namespace, tally: Tally) -> Iterator[Page]:
    """One page a document."""
    rule, folder = PictureRule.of(args), _folder(unit.path)
    for name in unit.names:
        try:
            yield _page(name, folder, rule, args.min_images)
        except Dropped as dropped:
            tally.drop_page(dropped.reason, name)


def _page(name: str, folder: PictureFolder, rule: PictureRule, min_images: int) -> Page:
    try:
        pieces = PLACE.split(folder.read(name).decode("utf-8"))  # text, path, text, path, ...
    except UnicodeDecodeError:
        raise Dropped("document is not UTF-8") from None
    page = Page("", [], [], {"file": name})
    numbers: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            if piece.strip():
                page.nodes.append(Text(piece.strip()))
            continue
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(piece)))
        if path not in numbers:
            page.images.append(rule.check(folder.read(path)))
            numbers[path] = len(page.images) - 1
        page.nodes.append(Picture((numbers[path],)))
    if not page.nodes:
        raise Dropped("empty document")
    if len(page.images) < min_images:
        raise Dropped(f"fewer than {min_images} pictures")
    return page
