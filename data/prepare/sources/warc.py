"""Web pages in WARC files (Common Crawl's, or your own crawl) to interleaved documents, as OBELICS and M3W were made.

HTML records become documents in the order of their DOM. Images are looked up by address: among downloaded ones
(--images: tars of img2dataset, or a map), or, without --images, among the image records of the same WARC files.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from data.prepare.inputs import file_units, required
from data.prepare.lookup import Entry, build_lookup, build_url_lookup, open_lookup
from data.prepare.units import InputUnit, Tally
from data.prepare.web.address import same_address
from data.prepare.web.charset import decode_html
from data.prepare.web.documents import add_web_arguments, check_web_arguments, lookup_of, web_document
from data.prepare.web.records import responses
from data.shards.document import Document
from flamingo.errors import UserError

LAYOUT = "interleaved"
SUFFIXES = (".warc", ".warc.gz", ".warc.lz4", ".warc.zst")
MAX_HTML = 10_000_000  # bytes; larger pages are dropped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare warc`."""
    parser.add_argument("--images", nargs="+", default=[], metavar="PATH", help="tars of img2dataset, or a map")
    add_web_arguments(parser)


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return a unit for each file."""
    check_web_arguments(args)
    required("fastwarc.warc", "reading WARC files")
    return file_units(args.inputs, SUFFIXES)


def begin(args: argparse.Namespace, work: Path) -> None:
    """Build the lookup of images by address; those in the WARC files are unpacked into `work` first."""
    if args.images:
        build_url_lookup(work / "images.sqlite", args.images)
    elif not (work / "images.sqlite").exists():
        build_lookup(work / "images.sqlite", _spooled(args, work / "images.bin"))


def _spooled(args: argparse.Namespace, spool: Path) -> Iterator[Entry]:
    with spool.open("wb") as out:
        for unit in file_units(args.inputs, SUFFIXES):
            try:
                for response in responses(unit):
                    if response.url and response.is_image:
                        yield same_address(response.url), str(spool), out.tell(), len(response.body)
                        out.write(response.body)
            except UserError:
                if not args.skip_bad_files:  # counted as damaged when its documents are read
                    raise


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield a document for each page."""
    images = open_lookup(lookup_of(args))
    for response in responses(unit, tally.drop_document):
        if not response.is_page:
            continue
        where = f"{unit.label} response {response.index} ({response.url})"
        if len(response.body) > MAX_HTML:
            tally.drop_document("HTML of more than 10 MB", where)
            continue
        html = decode_html(response.body, response.charset)
        document = web_document(html, response.url, where, args, images.read_address, tally)
        if document is not None:
            yield document
