"""Web pages in WARC files (Common Crawl's, or your own crawl) to interleaved documents, as OBELICS and M3W were made.

HTML records become documents in the order of their DOM. Images are looked up by address: among downloaded ones
(--images: tars of img2dataset, or a map), or, without --images, among the image records of the same WARC files.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.prepare.inputs import file_units, one_line, required
from data.prepare.lookup import Entry, build_lookup, build_url_lookup, open_lookup
from data.prepare.units import InputUnit, Tally
from data.prepare.web.documents import add_web_arguments, check_web_arguments, lookup_of, web_document
from data.prepare.web.dom import decode_html
from data.shards.document import Document
from flamingo.errors import UserError

LAYOUT = "interleaved"
SUFFIXES = (".warc", ".warc.gz", ".warc.lz4", ".warc.zst")
HTML = ("text/html", "application/xhtml+xml")
MAX_RECORD = 100_000_000  # bytes; anything larger is neither a page nor an image
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
                for record, _ in responses(unit):
                    url = record.headers.get("WARC-Target-URI")
                    if url and (record.http_content_type or "").startswith("image/"):
                        body = record.reader.read()
                        yield url, str(spool), out.tell(), len(body)
                        out.write(body)
            except UserError:
                if not args.skip_bad_files:  # counted as damaged when its documents are read
                    raise


def responses(unit: InputUnit) -> Iterator[tuple[Any, int]]:
    """Yield (record, number from 0) of a WARC's responses with status 200. Raises UserError when it is damaged."""
    warc = required("fastwarc.warc", "reading WARC files")
    number = -1
    try:
        with Path(unit.path).open("rb") as file:
            records = warc.ArchiveIterator(file, record_types=warc.WarcRecordType.response, parse_http=False)
            for number, record in enumerate(records):
                size = int(record.headers.get("Content-Length") or -1)
                if size > MAX_RECORD:
                    continue
                record.freeze()  # reads all of it: the parser alone accepts a record that was cut off
                if record.content_length != size:
                    raise ValueError(f"a record of {size} bytes ends after {record.content_length}")
                record.parse_http(auto_decode="all")
                if record.http_headers is not None and record.http_headers.status_code == 200:
                    yield record, number
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{unit.path} is damaged at response {max(number, 0)} ({one_line(error)}); download it again"
        ) from None
    if number < 0:
        raise UserError(f"{unit.path} has no response record; is it a WARC file and not a WET or WAT one?")


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield a document for each page."""
    images = open_lookup(lookup_of(args))
    for record, number in responses(unit):
        kind = (record.http_content_type or record.headers.get("WARC-Identified-Payload-Type") or "").lower()
        if not kind.startswith(HTML):
            continue
        url = record.headers.get("WARC-Target-URI") or ""
        where = f"{unit.label} response {number} ({url})"
        body = record.reader.read(MAX_HTML + 1)
        if len(body) > MAX_HTML:
            tally.drop_document("HTML of more than 10 MB", where)
            continue
        charset = record.http_charset or record.headers.get("WARC-Identified-Content-Charset")
        document = web_document(decode_html(body, charset), url, where, args, images.read, tally)
        if document is not None:
            yield document
