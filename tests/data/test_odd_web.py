"""Crawls as wget, browsers and archives leave them: charsets, addresses, headers that lie, images that load late."""

from __future__ import annotations

import contextlib
import gzip
import tempfile
import zlib
from pathlib import Path

import brotli
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.prepare.units import Dropped, InputUnit
from data.prepare.web.address import joined, same_address
from data.prepare.web.charset import decode_html
from data.prepare.web.dom import WebImage, read_dom
from data.prepare.web.records import decoded, responses
from flamingo.errors import UserError
from tests.data.sources import Prepared, flat, jpeg, prepare

PAGE = b"<html><body><p>Hello page.</p><img src='/a.jpg'></body></html>"


def record(
    url: str, body: bytes, kind: str = "text/html", *headers: str, warc: str = "response", status: str = "200 OK"
) -> bytes:
    http = "".join(
        f"{line}\r\n" for line in (f"HTTP/1.1 {status}", *([f"Content-Type: {kind}"] if kind else []), *headers)
    )
    block = (http.encode() + b"\r\n" if warc == "response" else b"") + body
    content = "application/http; msgtype=response" if warc == "response" else kind
    return (
        (
            f"WARC/1.0\r\nWARC-Type: {warc}\r\nWARC-Record-ID: <urn:uuid:12345678-1234-1234-1234-1234567890ab>\r\n"
            f"WARC-Date: 2024-01-01T00:00:00Z\r\nWARC-Target-URI: {url}\r\nContent-Type: {content}\r\n"
            f"Content-Length: {len(block)}\r\n\r\n"
        ).encode()
        + block
        + b"\r\n\r\n"
    )


IMAGE = record("http://e.org/a.jpg", jpeg(1), "image/jpeg")


def crawled(folder: Path, *records: bytes) -> Prepared:
    path = folder / "a.warc"
    path.write_bytes(b"".join(records))
    return prepare(folder / "out", "warc", path, "--filters", "none")


TEXTS = {
    "latin1": ("It\u2019s \u201cso\u201d", "cp1252"),
    "ISO-8859-1": ("\u20ac 5", "cp1252"),
    "us-ascii": ("caf\u00e9 \u2013 na\u00efve", "cp1252"),
    "gb2312": ("\u6731\u9555\u57fa", "gbk"),
    "GBK": ("\u6731\u9555\u57fa \u3400", "gb18030"),
    "ks_c_5601-1987": ("\ud55c\uad6d\uc5b4 \ub620\ubc29", "cp949"),
    "x-sjis": ("\u2460 \u65e5\u672c", "cp932"),
    "tis-620": ("\u0e44\u0e17\u0e22", "cp874"),
    "iso-8859-9": ("\u011f\u0131\u015f \u20ac", "cp1254"),
    "windows-1251": ("\u0431\u043e\u043b\u044c\u0448\u0435", "cp1251"),
    "unicode-1-1-utf-8": ("gr\u00f6\u00dfer", "utf-8"),
}


@pytest.mark.parametrize("label", TEXTS)
@pytest.mark.parametrize("where", ["header", "meta", "http-equiv", "xml", "quoted header"])
def test_labels_mean_what_browsers_take_them_for(tmp_path: Path, label: str, where: str) -> None:
    text, codec = TEXTS[label]
    head = {
        "meta": f"<meta charset={label}>",
        "http-equiv": f'<meta http-equiv="Content-Type" content="text/html; charset={label}">',
        "xml": f'<?xml version="1.0" encoding="{label}"?>',
    }.get(where, "<meta charset=utf-8>")
    page = f"{head}<p>{text}</p><img src=/a.jpg>".encode(codec)
    kind = {"header": f"text/html; Charset={label}", "quoted header": f'text/html;charset="{label}"'}.get(
        where, "text/html"
    )
    (document,) = crawled(tmp_path, record("http://e.org/", page, kind), IMAGE).documents
    assert flat(document) == [text, jpeg(1)]


def test_the_order_of_who_may_name_the_charset() -> None:
    assert decode_html(b"\xef\xbb\xbf<meta charset=latin1>\xc3\xa9", "latin1")[-1] == "\u00e9"
    assert decode_html(b"<meta charset=koi8-r>\xc3\xa9", "utf-8")[-1] == "\u00e9"
    assert decode_html(b"<!-- <meta charset=koi8-r> --><meta charset=utf-8>\xc3\xa9")[-1] == "\u00e9"
    assert decode_html(b"<meta charset=utf-16>\xc3\xa9")[-1] == "\u00e9"
    assert decode_html(b"<meta charset=nonsense>\xc3\xa9")[-1] == "\u00e9"


def test_one_bad_byte_costs_one_character() -> None:
    body = "caf\u00e9 \u2019 na\u00efve ".encode() + b"\xff tail"
    for charset in ("utf-8", None):
        assert decode_html(body, charset) == "caf\u00e9 \u2019 na\u00efve \ufffd tail"
    assert decode_html(b"<meta charset=gb2312>" + "\u6731".encode("gbk") + b"\xff!", None).endswith("\u6731\ufffd!")


def test_without_a_label_it_is_utf8_or_a_guess() -> None:
    assert decode_html("gr\u00f6\u00dfer".encode("latin-1")) == "gr\u00f6\u00dfer"
    chinese = "\u6731\u9555\u57fa\u603b\u7406\u4eca\u5929\u5728\u5317\u4eac\u4f1a\u89c1\u4e86\u5916\u56fd\u5ba2\u4eba"
    assert decode_html(chinese.encode("gbk")) == chinese


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.none() | st.text(max_size=12))
def test_every_page_is_decoded(raw: bytes, charset: str | None) -> None:
    read_dom(decode_html(raw, charset), "http://e.org/")


@pytest.mark.parametrize(
    ("said", "stored"),
    [
        ("/a b.jpg", "http://e.org/a%20b.jpg"),
        ("/c.jpg#x", "http://e.org/c.jpg"),
        ("c.jpg", "http://E.ORG:80/c.jpg#top"),
        ("\n /c.jpg\t", "http://e.org/c.jpg"),
        ("\\img\\c.jpg", "http://e.org/img/c.jpg"),
        ("/x/../c.jpg", "http://e.org/c.jpg"),
        ("/\u00fc.jpg", "http://e.org/%C3%BC.jpg"),
        ("/%c3%bc.jpg", "http://e.org/\u00fc.jpg"),
        ("//b\u00fccher.de/c.jpg", "http://xn--bcher-kva.de/c.jpg"),
        ("https://e.org:443/c.jpg?q=a b&r=\u00e9", "https://e.org/c.jpg?q=a%20b&r=%C3%A9"),
        ("/c.jpg?w=1&amp;h=2", "http://e.org/c.jpg?w=1&h=2"),
        ("http://e.org", "http://e.org/"),
        ("/a%7Eb.jpg", "http://e.org/a~b.jpg"),
    ],
)
def test_addresses_are_compared_as_browsers_do(tmp_path: Path, said: str, stored: str) -> None:
    page = f"<meta charset=utf-8><p>Hello.</p><img src='{said}'>".encode()
    done = crawled(tmp_path, record("http://e.org/i.html", page), record(stored, jpeg(1), "image/jpeg"))
    assert [flat(document) for document in done.documents] == [["Hello.", jpeg(1)]]


def test_different_addresses_stay_different() -> None:
    addresses = [
        "http://e.org/a",
        "https://e.org/a",
        "http://e.org:8080/a",
        "http://e.org/A",
        "http://e.org/a?b",
        "http://e.org/a%2Fb",
        "http://e.org/a/b",
    ]
    assert len(set(map(same_address, addresses))) == len(addresses)


@settings(max_examples=200, deadline=None)
@given(
    st.text(max_size=40)
    | st.text(alphabet="htp:/\\[]@?#%.&= \t\n1a\u00fc\ud800", max_size=40).map(lambda t: f"http://{t}")
)
def test_any_address_is_compared(address: str) -> None:
    once = same_address(joined("http://e.org/", address))
    assert same_address(once) == once or "%" in once


def test_brackets_of_wget(tmp_path: Path) -> None:
    done = crawled(tmp_path, record("<http://e.org/>", PAGE), record("<http://e.org/a.jpg>", jpeg(1), "image/jpeg"))
    assert done.documents[0].meta["url"] == "http://e.org/"


CHUNKED = b"%x\r\n" % len(PAGE) + PAGE + b"\r\n0\r\n\r\n"
ENCODED = {
    "gzip": (gzip.compress(PAGE), "Content-Encoding: gzip"),
    "gzip in capitals": (gzip.compress(PAGE), "CONTENT-ENCODING: GZIP"),
    "gzip in two members": (gzip.compress(PAGE[:9]) + gzip.compress(PAGE[9:]), "Content-Encoding: gzip"),
    "gzip with a tail": (gzip.compress(PAGE) + b"\0\0", "Content-Encoding: gzip"),
    "gzip that is not": (PAGE, "Content-Encoding: gzip"),
    "x-gzip": (gzip.compress(PAGE), "Content-Encoding: x-gzip"),
    "deflate": (zlib.compress(PAGE), "Content-Encoding: deflate"),
    "raw deflate": (zlib.compress(PAGE)[2:-4], "Content-Encoding: deflate"),
    "deflate that is not": (PAGE, "Content-Encoding: deflate"),
    "brotli": (brotli.compress(PAGE), "Content-Encoding: br"),
    "brotli that is not": (PAGE, "Content-Encoding: br"),
    "identity": (PAGE, "Content-Encoding: identity"),
    "nonsense": (PAGE, "Content-Encoding: utf-8"),
    "chunked": (CHUNKED, "Transfer-Encoding: chunked"),
    "chunked that is not": (PAGE, "Transfer-Encoding: chunked"),
}


@pytest.mark.parametrize("name", ENCODED)
def test_encodings_are_undone_or_were_never_there(tmp_path: Path, name: str) -> None:
    body, header = ENCODED[name]
    done = crawled(tmp_path, record("http://e.org/", body, "text/html", header), IMAGE)
    assert [flat(document) for document in done.documents] == [["Hello page.", jpeg(1)]]


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("IMAGE/JPEG", "response"),
        ("application/octet-stream", "response"),
        ("", "response"),
        ("text/plain", "response"),
        ("image/jpeg", "resource"),
        ("application/octet-stream", "resource"),
    ],
)
def test_images_by_whatever_type(tmp_path: Path, kind: str, form: str) -> None:
    image = record("http://e.org/a.jpg", jpeg(1), kind, warc=form)
    for number, (page, page_form) in enumerate(
        (("TEXT/HTML; charset=UTF-8", "response"), ("text/html", "resource"), ("", "response"))
    ):
        (tmp_path / str(number)).mkdir()
        body = PAGE if page else b"<!DOCTYPE html>" + PAGE
        done = crawled(tmp_path / str(number), record("http://e.org/", body, page, warc=page_form), image)
        assert [flat(document) for document in done.documents] == [["Hello page.", jpeg(1)]]


def test_a_response_that_cannot_be_read_is_counted(tmp_path: Path) -> None:
    zstd = record("http://e.org/z", b"\x28\xb5\x2f\xfd" + bytes(40), "text/html", "Content-Encoding: zstd")
    done = crawled(
        tmp_path, zstd, record("http://e.org/", PAGE), IMAGE, record("http://e.org/no", b"", status="404 Not Found")
    )
    assert len(done.documents) == 1
    assert done.dropped == {"body compressed with zstd, which is not read": 1}


def test_a_body_that_is_cut_off_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = PAGE.replace(b"Hello", b"".join(b"%d " % number for number in range(9000)) + b"Hello")
    cut = (gzip.compress(long)[:-2000], zlib.compress(long)[:-2000], gzip.compress(PAGE) + gzip.compress(long)[:-9])
    pages = [
        record(f"http://e.org/{number}", body, "text/html", "Content-Encoding: deflate")
        for number, body in enumerate(cut)
    ]
    monkeypatch.setattr("data.prepare.web.records.MAX_RECORD", 100_000)
    bomb = record("http://e.org/bomb", gzip.compress(bytes(10**7)), "text/html", "Content-Encoding: gzip")
    done = crawled(tmp_path, *pages, bomb, record("http://e.org/", PAGE), IMAGE)
    assert len(done.documents) == 1
    assert done.dropped == {"compressed body is cut off": 3, "body too large": 1}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1200), st.binary(min_size=1, max_size=8)), max_size=4), st.integers(0, 900))
def test_a_damaged_warc_is_one_sentence(edits: list[tuple[int, bytes]], cut: int) -> None:
    data = bytearray(record("http://e.org/", PAGE) + IMAGE)
    for at, new in edits:
        data[at % len(data) : at % len(data) + len(new)] = new
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.warc"
        path.write_bytes(data[: len(data) - cut])
        with contextlib.suppress(UserError):
            list(responses(InputUnit("a.warc", str(path))))


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=60),
    st.sampled_from(["", "chunked"]),
    st.sampled_from(["gzip", "deflate", "br", "gzip, br", ",,"]),
)
def test_any_body_is_decoded(body: bytes, transfer: str, content: str) -> None:
    with contextlib.suppress(Dropped):
        assert isinstance(decoded(body, transfer, content), bytes)


LATE = {
    "<img src='blank.gif' data-src='r.jpg'>": "r.jpg",
    "<img src='data:image/gif;base64,R0lGOD' data-original='r.jpg'>": "r.jpg",
    "<img src='/img/placeholder.png?v=1' srcset='s.jpg 1x, r.jpg 2x'>": "r.jpg",
    "<img src='data:image/gif;base64,R0lGOD' data-srcset='s.jpg 100w, r.jpg 900w'>": "r.jpg",
    "<img class=lazy src='spacer.gif'><noscript><img class=x src='r.jpg'></noscript>": "r.jpg",
    "<noscript>&nbsp;<img alt='a > b' src=r.jpg></noscript> <img data-x=1 src='data:image/gif;base64,R0lGOD'>": "r.jpg",
    "<picture><source data-srcset='r.jpg 2x'><img src='1x1.png'></picture>": "r.jpg",
    "<amp-img src='r.jpg' width=3></amp-img>": "r.jpg",
    "<img src='r.jpg' srcset='s.jpg 2x'><noscript><img src=n.jpg></noscript>": "r.jpg",
    "<img src='whitehouse.jpg'>": "whitehouse.jpg",
    "<img src='only-placeholder.gif'>": "only-placeholder.gif",
}


@pytest.mark.parametrize("html", LATE)
def test_images_that_load_late(html: str) -> None:
    parts = read_dom(f"<body><p>t</p>{html}</body>", "http://e.org/")
    assert [part.url for part in parts if isinstance(part, WebImage)] == [f"http://e.org/{LATE[html]}"]
