"""Addresses as browsers resolve and compare them: what a page names is what a crawler has stored."""

from __future__ import annotations

import re
from urllib.parse import quote, urljoin, urlsplit

from data.prepare.inputs import required

ENDS = "".join(map(chr, range(33)))  # blanks and control characters, which browsers take away at both ends
ESCAPE = re.compile(r"%[0-9a-fA-F]{2}")
UNSAFE = re.compile(r"""[^!-~]|["'<>]""")


def cleaned(address: str) -> str:
    """Return an address without the blanks and brackets around it, line ends within it, and backslashes for slashes."""
    address = re.sub(r"[\t\r\n]", "", address.strip(ENDS))
    if address.startswith("<") and address.endswith(">"):  # wget 1.19 to 1.21 writes WARC-Target-URI: <http://...>
        address = address[1:-1].strip(ENDS)
    path, mark, rest = address.partition("?")
    return address if path.lower().startswith("data:") else path.replace("\\", "/") + mark + rest


def joined(base: str, address: str) -> str:
    """Make an address absolute where there is a base; return "" for what is not an address of the web."""
    try:
        full = urljoin(base, cleaned(address))
        scheme = urlsplit(full).scheme
    except ValueError:
        return ""
    return full if scheme in ("http", "https", "") else ""


def same_address(address: str) -> str:
    """Return the form in which equal addresses are equal: escaped, without fragment and default port, host in ASCII."""
    address = cleaned(cleaned(address).partition("#")[0])  # blanks before a fragment are at the end without it
    try:
        url = required("yarl", "comparing addresses").URL(address)
        return (
            str(url.with_query(None).with_path(url.raw_path or "/", encoded=True)) + _query(address)
            if url.host
            else address
        )
    except (ValueError, UnicodeError):
        return address


def _query(address: str) -> str:
    """Return a query escaped as browsers send it; what is escaped already stays, in capitals."""
    _, mark, query = address.partition("?")
    escaped = ESCAPE.sub(lambda match: match[0].upper(), query)
    return mark + UNSAFE.sub(lambda match: quote(match[0], safe="", errors="replace"), escaped)
