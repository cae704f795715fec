"""The responses in WARC files: pages and images as a browser would have got them, whatever their headers claim."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from data.prepare.inputs import one_line, required
from data.prepare.units import Dropped, InputUnit
from data.prepare.web.address import cleaned
from data.shards.places import place
from flamingo.errors import UserError
from flamingo.vision.image_files import sniff

HTML = ("text/html", "application/xhtml+xml")
UNTYPED = ("", "application/octet-stream", "binary/octet-stream", "application/unknown", "unknown/unknown")
MAX_RECORD = 100_000_000  # bytes; anything larger is neither a page nor an image
CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]{0,200})?\r?\n")


@dataclass(frozen=True, slots=True)
class Response:
    """What a server sent, its encodings undone: its address, type in small letters, charset, and number in the file."""

    url: str
    type: str
    charset: str | None
    body: bytes
    index: int

    @property
    def is_page(self) -> bool:
        """Whether it is HTML, by its type or, where that says nothing, by its beginning."""
        if self.type.startswith(HTML):
            return True
        begins = self.body[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        return self.type in UNTYPED and begins.startswith((b"<!doctype html", b"<html"))

    @property
    def is_image(self) -> bool:
        """Whether it is an image, by its type or, unless it is HTML, by its first bytes."""
        return self.type.startswith("image/") or (not self.is_page and sniff(self.body) is not None)


def responses(
    unit: InputUnit, passed_over: Callable[[str, str], None] = lambda reason, where: None
) -> Iterator[Response]:
    """Yield a WARC's responses with status 200 and its resources.

    `passed_over` is called with (reason, where) for one that cannot be read. Raises UserError for a damaged file.
    """
    warc = required("fastwarc.warc", "reading WARC files")
    kinds = warc.WarcRecordType.response | warc.WarcRecordType.resource
    index = -1
    try:
        with place(unit.path).open("rb") as file:
            for index, record in enumerate(warc.ArchiveIterator(file, record_types=kinds, parse_http=False)):
                where = f"{unit.label} response {index}"
                size = int(record.headers.get("Content-Length") or -1)
                if size > MAX_RECORD:
                    passed_over(f"record of more than {MAX_RECORD // 1_000_000} MB", where)
                    continue
                record.freeze()  # reads all of it: the parser alone accepts a record that was cut off
                if record.content_length != size:
                    raise ValueError(f"a record of {size} bytes ends after {record.content_length}")
                try:
                    response = _response(record, index, record.record_type == warc.WarcRecordType.resource)
                except Dropped as dropped:
                    passed_over(dropped.reason, where)
                    continue
                except (OSError, ValueError, RuntimeError):
                    passed_over("HTTP header cannot be read", where)
                    continue
                if response is not None:
                    yield response
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{unit.path} is damaged at response {max(index, 0)} ({one_line(error)}); download it again"
        ) from None
    if index < 0:
        raise UserError(f"{unit.path} has no response record; is it a WARC file and not a WET or WAT one?")


def _response(record: Any, index: int, resource: bool) -> Response | None:
    """Return what a record holds, None for another status than 200. Raises for an HTTP header that is none."""
    identified = record.headers.get("WARC-Identified-Payload-Type") or ""
    charset = record.headers.get("WARC-Identified-Content-Charset")
    if resource:
        body, declared = record.reader.read(), record.headers.get("Content-Type") or ""
    else:
        record.parse_http(auto_decode="none", quirks_mode=True)
        if record.http_headers is None or record.http_headers.status_code != 200:
            return None
        headers = record.http_headers
        encodings = (headers.get(name) or "" for name in ("Transfer-Encoding", "Content-Encoding"))
        body = decoded(record.reader.read(), *encodings)
        declared = headers.get("Content-Type") or ""
    kind, _, parameters = declared.partition(";")
    if match := re.search(r"charset\s*=\s*[\"']?\s*([\w.:-]+)", parameters, re.IGNORECASE):
        charset = match[1]
    url = cleaned(record.headers.get("WARC-Target-URI") or "")
    return Response(url, (kind.strip() or identified).lower(), charset, body, index)


def decoded(body: bytes, transfer: str, content: str) -> bytes:
    """Return a body with its transfer and content encodings undone; one that the header only claims is left alone."""
    if "chunked" in transfer.lower():
        body = _unchunked(body)
    for name in reversed(content.lower().split(",")):
        body = _decompressed(body, name.strip())
    return body


def _unchunked(body: bytes) -> bytes:
    parts: list[bytes] = []
    at = 0
    while match := CHUNK.match(body, at):
        size = int(match[1], 16)
        if size == 0:
            return b"".join(parts)
        if match.end() + size > len(body):
            break
        parts.append(body[match.end() : match.end() + size])
        at = match.end() + size
        at += 2 if body[at : at + 2] == b"\r\n" else 1
    return body  # crawlers store bodies unchunked under the header as it was


def _inflated(body: bytes, window: int) -> bytes:
    """Return all members of a body, one behind another. Raises zlib.error where it is not compressed."""
    parts: list[bytes] = []
    left = MAX_RECORD
    while not parts or body.startswith(b"\x1f\x8b"):
        unpacker = zlib.decompressobj(window)
        parts.append(unpacker.decompress(body, left))
        if not unpacker.eof:
            if not unpacker.unconsumed_tail and window < 0:  # no header: anything at all may begin like this
                raise zlib.error("no end")
            raise Dropped("body too large" if unpacker.unconsumed_tail else "compressed body is cut off")
        left -= len(parts[-1])
        if left <= 0:
            raise Dropped("body too large")
        body = unpacker.unused_data
    return b"".join(parts)


def _decompressed(body: bytes, name: str) -> bytes:
    if body and name in ("gzip", "x-gzip", "deflate"):
        for window in (47, -15) if name == "deflate" else (47,):
            try:
                return _inflated(body, window)
            except zlib.error:
                continue
    elif name == "br":
        try:
            return required("brotli", "reading pages compressed with brotli").decompress(body)
        except required("brotli", "reading pages compressed with brotli").error:
            return body
    elif name == "zstd" and body.startswith(b"\x28\xb5\x2f\xfd"):
        raise Dropped("body compressed with zstd, which is not read")
    return body
