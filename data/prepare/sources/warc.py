"""Documents of WARC files (Common Crawl's, or one's own crawl) to interleaved documents: how OBELICS and M3W were made.

Records of HTML become documents by the order of the DOM. Images are looked up by address: among those downloaded
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
MAX_RECORD = 100_000_000  # bytes; what is larger is no document and no image
MAX_HTML = 10_000_000  # bytes; nothing larger is a document to be read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m data prepare warc`."""
    parser.add_argument("--images", nargs="+", default=[], metavar="PATH", help="tars of img2dataset, or a map")
    add_web_arguments(parser)


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Files whole."""
    check_web_arguments(args)
    required("fastwarc.warc", "reading WARC files")
    return file_units(args.inputs, SUFFIXES)


def begin(args: argparse.Namespace, work: Path) -> None:
    """Find out where the images are; those in the WARC files are written out, unpacked, for the time of the work."""
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
                if not args.skip_bad_files:  # it is counted when its documents are asked for
                    raise


def responses(unit: InputUnit) -> Iterator[tuple[Any, int]]:
    """(record, number from 0) of the answers with status 200 of a WARC. Raises UserError when it is damaged."""
    warc = required("fastwarc.warc", "reading WARC files")
    number = -1
    try:
        with Path(unit.path).open("rb") as file:
            records = warc.ArchiveIterator(file, record_types=warc.WarcRecordType.response, parse_http=False)
            for number, record in enumerate(records):
                size = int(record.headers.get("Content-Length") or -1)
                if size > MAX_RECORD:
                    continue
                record.freeze()  # all of it, to see whether it is all there: the parser takes what a cut file has
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
    """One document a record of HTML."""
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
