"""A web page's text and images in the order of its DOM.

What is not content (navigation, forms, scripts, hidden elements) is left out with everything in it. A paragraph ends
where a block element begins or ends, and an image inside a sentence divides the sentence. The address of an image is
the first usable one of src, data-src and the like, and srcset, made absolute.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

from data.prepare.inputs import required

_SKIPPED = """
    script style noscript template svg math head nav footer aside form button select option input textarea label
    iframe object embed canvas audio video map dialog menu
"""
SKIPPED = frozenset(_SKIPPED.split())
_BLOCKS = """
    address article blockquote body caption center dd details div dl dt fieldset figcaption figure h1 h2 h3
    h4 h5 h6 header hgroup hr html li main ol p pre section summary table tbody td tfoot th thead tr ul
"""
BLOCKS = frozenset(_BLOCKS.split())
_ROLES = """
    navigation banner contentinfo complementary search menu menubar dialog alert
"""
ROLES = frozenset(_ROLES.split())
SOURCES = ("src", "data-src", "data-original", "data-lazy-src", "data-image", "data-src-fg", "data-echo")
LINE = "\v"  # stands for a <br> until the paragraph ends; two in a row end it
CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]{1,40})""", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class WebImage:
    """An image of a page: its address, and the width and height in pixels that the page gives it (0: none)."""

    url: str
    width: int = 0
    height: int = 0


WebPart = str | WebImage


def decode_html(raw: bytes, charset: str | None = None) -> str:
    """Decode a page: by byte-order mark, the given charset, the page's own `<meta>`, UTF-8, else as Windows-1252."""
    for mark, name in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if raw.startswith(mark):
            return raw[len(mark) :].decode(name, "replace")
    declared = CHARSET.search(raw[:4096])
    for encoding in (charset, declared[1].decode("ascii") if declared else None, "utf-8"):
        try:
            return raw.decode(encoding or "utf-8")
        except (LookupError, ValueError):
            continue
    return raw.decode("cp1252", "replace")


def read_dom(html: str, url: str = "") -> list[WebPart]:
    """Return the paragraphs and images of the page at `url`, in order."""
    html = html.encode("utf-8", "replace").decode()  # removes half surrogate pairs, which some charsets let through
    parser = required("selectolax.lexbor", "reading HTML").LexborHTMLParser(html)
    base = parser.css_first("base[href]")
    where = _join(url, base.attributes.get("href") or "") if base is not None else url
    parts: list[WebPart] = []
    run: list[str] = []

    def end_paragraph() -> None:
        for text in re.split(rf"{LINE}\s*{LINE}", "".join(run)):
            lines = (" ".join(line.split()) for line in text.split(LINE))
            if paragraph := "\n".join(line for line in lines if line):
                parts.append(paragraph)
        run.clear()

    stack: list[tuple[Any, bool]] = [(parser.body, False)] if parser.body is not None else []
    while stack:  # not by recursion: pages are nested thousands deep
        node, leaving = stack.pop()
        tag = node.tag
        if leaving:
            end_paragraph()
            continue
        if node.next is not None and tag != "body":
            stack.append((node.next, False))
        if node.is_text_node:
            run.append(node.text_content or "")
            continue
        if not node.is_element_node or tag in SKIPPED or _hidden(node.attributes):
            continue
        if tag == "img":
            image = _image(node, where)
            if image is not None:
                end_paragraph()
                parts.append(image)
            continue
        if tag == "br":
            run.append(LINE)
            continue
        if tag in BLOCKS:
            end_paragraph()
            stack.append((node, True))
        if node.child is not None:
            stack.append((node.child, False))
    end_paragraph()
    return parts


def _hidden(attributes: dict[str, str | None]) -> bool:
    style = (attributes.get("style") or "").replace(" ", "").lower()
    return (
        "hidden" in attributes
        or attributes.get("aria-hidden") == "true"
        or (attributes.get("role") or "").lower() in ROLES
        or "display:none" in style
        or "visibility:hidden" in style
    )


def _image(node: Any, base: str) -> WebImage | None:
    attributes = node.attributes
    addresses = [attributes.get(name) for name in SOURCES]
    addresses += [_widest(attributes.get(name)) for name in ("srcset", "data-srcset")]
    parent = node.parent
    if parent is not None and parent.tag == "picture":
        addresses += [_widest(source.attributes.get("srcset")) for source in parent.css("source")]
    sizes = (_pixels(attributes.get("width")), _pixels(attributes.get("height")))
    inline = None
    for address in addresses:
        address = (address or "").strip()
        if address.startswith("data:"):
            inline = inline or address  # most often a placeholder of one pixel: a last resort
        elif address and (full := _join(base, address)):
            return WebImage(full, *sizes)
    return WebImage(inline, *sizes) if inline and inline.startswith("data:image/") else None


def _widest(srcset: str | None) -> str | None:
    """Return the address with the largest width or density in a srcset."""
    best, most = None, -1.0
    for item in re.split(r",\s+|,(?=https?:)", srcset or ""):
        address, _, size = item.strip().partition(" ")
        try:
            width = float(size.strip()[:-1]) if size.strip() else 1.0
        except ValueError:
            continue
        if address and width > most:
            best, most = address.rstrip(","), width
    return best


def _pixels(value: str | None) -> int:
    match = re.fullmatch(r"\s*(\d{1,6})(?:\.\d+)?\s*(?:px)?\s*", value or "")
    return int(match[1]) if match else 0


def _join(base: str, address: str) -> str:
    """Make an address absolute where there is a base; return "" for what is not an address."""
    try:
        full = urljoin(base, address)
        scheme = urlsplit(full).scheme
    except ValueError:
        return ""
    return full if scheme in ("http", "https", "") else ""
