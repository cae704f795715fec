"""Saved web pages to interleaved documents, by the order of the DOM and the rules of OBELICS or M3W.

A page's image is the file that its address names, below the input folder (a page saved as "complete"); with --images it
is looked up by its absolute address (in tars of img2dataset or a map). `data:` images are read as well.
"""

from __future__ import annotations

import argparse
import posixpath
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data.prepare.images import ImageFolder
from data.prepare.inputs import folder_files, folder_units, input_files
from data.prepare.lookup import build_url_lookup, open_lookup
from data.prepare.units import Dropped, InputUnit, Tally
from data.prepare.web.charset import decode_html
from data.prepare.web.documents import add_web_arguments, check_web_arguments, lookup_of, page_address, web_document
from data.shards.document import Document
from data.shards.places import place

LAYOUT = "interleaved"
SUFFIXES = (".html", ".htm", ".xhtml")
IN_A_UNIT = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare html`."""
    parser.add_argument("--images", nargs="+", default=[], metavar="PATH", help="tars of img2dataset, or a map")
    add_web_arguments(parser)


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return units of a thousand files."""
    check_web_arguments(args)
    result: list[InputUnit] = []
    for item in args.inputs:
        files = input_files([item], SUFFIXES)
        if folder_files(item) is not None:
            result += folder_units(item, {name: path.stat().st_size for name, path in files}, IN_A_UNIT)
            continue
        for label, path in files:
            result.append(InputUnit(label, str(path.parent), 0, 1, path.stat().st_size, (path.name,)))
    return result


def begin(args: argparse.Namespace, work: Path) -> None:
    """Build the lookup of images by address."""
    if args.images:
        build_url_lookup(work / "images.sqlite", args.images)


@lru_cache(maxsize=4)
def _folder(root: str) -> ImageFolder:
    return ImageFolder(root)


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield a document for each page."""
    folder = _folder(unit.path)
    for name in unit.names:
        html = decode_html((place(unit.path) / name).read_bytes())
        url = page_address(html)
        document = web_document(html, url if args.images else "", name, args, _fetcher(name, args, folder), tally)
        if document is not None:
            yield document


def _fetcher(name: str, args: argparse.Namespace, folder: ImageFolder) -> Callable[[str], bytes]:
    def fetch(address: str) -> bytes:
        if args.images:
            return open_lookup(lookup_of(args)).read_address(address)
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            raise Dropped("image is not in the folder; give --images")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path)))
        return folder.read(path)

    return fetch
