"""Decodes web pages as browsers do: the labels of the WHATWG standard, and its order of who may say what.

A byte-order mark, then the server's header, then the page's own declaration. Labels mean what browsers take them for
(latin1 is Windows-1252, gb2312 is GBK), and a byte that does not fit costs one character, never the page.
"""

from __future__ import annotations

import re

from data.prepare.inputs import required

MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
COMMENT = re.compile(rb"<!--.*?(?:-->|$)", re.DOTALL)
META = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]{1,40})""", re.IGNORECASE)
XML = re.compile(rb"""^\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']\s*([\w.:-]{1,40})""", re.IGNORECASE)
HEAD = 4096  # bytes in which a page declares its charset
PYTHON = {"gbk": "gb18030", "shift_jis": "cp932", "euc-kr": "cp949", "big5": "big5hkscs"}  # Python's are stricter
_GUESSED = """
    gb18030 gbk gb2312 hz big5 big5hkscs cp950 cp932 shift_jis shift_jis_2004 shift_jisx0213 euc_jp euc_jis_2004
    euc_jisx0213 iso2022_jp cp949 euc_kr johab cp1251 koi8_r koi8_u
"""
GUESSED = frozenset(_GUESSED.split())  # a guess among the Western ones is a coin's toss: browsers take Windows-1252
SAMPLE = 1 << 16  # bytes that are looked at to guess


def decode_html(raw: bytes, charset: str | None = None) -> str:
    """Return a page's text; `charset` is the server's label. Where nothing is declared it is UTF-8, or guessed."""
    for mark, name in MARKS:
        if raw.startswith(mark):
            return raw[len(mark) :].decode(name, "replace")
    for label in (charset, _declared(raw)):
        codec = _codec(label)
        if codec is not None:
            return raw.decode(codec, "replace")
    text = raw.decode("utf-8", "replace")
    wrong = text.count("\ufffd")
    if wrong == 0 or wrong * 2 < sum(not character.isascii() for character in text):  # each is one, too
        return text
    best = required("charset_normalizer", "reading HTML").from_bytes(raw[:SAMPLE]).best()
    return raw.decode("cp1252" if best is None or best.encoding not in GUESSED else best.encoding, "replace")


def _declared(raw: bytes) -> str | None:
    """Return the label of the page's own declaration. One that says UTF-16 could be read, so it is UTF-8."""
    head = COMMENT.sub(b"", raw[:HEAD])
    match = META.search(head) or XML.search(head)
    label = match[1].decode("ascii", "replace") if match else None
    return "utf-8" if label is not None and label.lower().startswith("utf-16") else label


def _codec(label: str | None) -> str | None:
    """Return Python's name of what browsers understand by a label, None for one that they do not know."""
    encodings = required("webencodings", "reading HTML")
    encoding = encodings.lookup((label or "").strip(" \t\r\n\"';"))
    if encoding is None or encoding.name == "x-user-defined":
        return None
    return PYTHON.get(encoding.name, encoding.codec_info.name)
