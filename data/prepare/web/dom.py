"""A web page's text and images in the order of its DOM.

What is not content (navigation, forms, scripts, hidden elements) is left out with everything in it. A paragraph ends
where a block element begins or ends, and an image inside a sentence divides the sentence. The address of an image is
that of data-src and the like, where src is a placeholder that of the `<noscript>` beside it or srcset, else src.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import unescape
from typing import Any

from data.prepare.inputs import required
from data.prepare.web.address import joined

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
_LAZY = """
    data-src data-original data-lazy-src data-lazy data-lazyload data-image data-src-fg data-echo data-original-src
    data-actualsrc data-img-src data-hi-res-src data-full-src data-url data-href
"""
LAZY = tuple(_LAZY.split())
LAZY_SETS = ("data-srcset", "data-lazy-srcset", "data-original-set")
PLACEHOLDER = re.compile(
    r"(?:^|[/_.-])(?:blank|placeholder|spacer|pixel|lazy|lazyload|loading|loader|transparent|trans|clear|dummy|empty|1x1|"
    r"grey|gray|white)(?:[_.-]\w+)?\.(?:gif|png|svg|jpe?g|webp)(?:\?|$)",
    re.IGNORECASE,
)
IMG = re.compile(r"""<img\s(?:[^>]*?\s)?src\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s>]+))""", re.IGNORECASE)
LINE = "\v"  # stands for a <br> until the paragraph ends; two in a row end it


@dataclass(frozen=True, slots=True)
class WebImage:
    """An image of a page: its address, and the width and height in pixels that the page gives it (0: none)."""

    url: str
    width: int = 0
    height: int = 0


WebPart = str | WebImage


def read_dom(html: str, url: str = "") -> list[WebPart]:
    """Return the paragraphs and images of the page at `url`, in order."""
    html = html.encode("utf-8", "replace").decode()  # removes half surrogate pairs, which some charsets let through
    parser = required("selectolax.lexbor", "reading HTML").LexborHTMLParser(html)
    base = parser.css_first("base[href]")
    where = joined(url, base.attributes.get("href") or "") if base is not None else url
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
        if tag in ("img", "amp-img"):
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
    """Return the image that a browser shows in the end: a lazy one's own address comes before its placeholder's."""
    attributes = node.attributes
    shown = (attributes.get("src") or "").strip()
    addresses = [attributes.get(name) for name in LAZY]
    addresses += [_widest(attributes.get(name)) for name in LAZY_SETS]
    if not shown or shown.startswith("data:") or PLACEHOLDER.search(shown):
        addresses += [_without_scripts(node), _widest(attributes.get("srcset")), *_of_picture(node), shown]
    else:
        addresses += [shown, _widest(attributes.get("srcset")), *_of_picture(node)]
    sizes = (_pixels(attributes.get("width")), _pixels(attributes.get("height")))
    inline = None
    for address in addresses:
        address = (address or "").strip()
        if address.startswith("data:"):
            inline = inline or address  # most often a placeholder of one pixel: a last resort
        elif address and (full := joined(base, address)):
            return WebImage(full, *sizes)
    return WebImage(inline, *sizes) if inline and inline.startswith("data:image/") else None


def _of_picture(node: Any) -> list[str | None]:
    parent = node.parent
    if parent is None or parent.tag != "picture":
        return []
    sets = [source.attributes for source in parent.css("source")]
    return [_widest(attributes.get(name)) for attributes in sets for name in ("srcset", *LAZY_SETS)]


def _without_scripts(node: Any) -> str | None:
    """Return the address in the `<noscript>` beside an image, which shows it to those who load none lazily."""
    for step in ("next", "prev"):
        beside = getattr(node, step)
        while beside is not None and (beside.is_text_node and not (beside.text_content or "").strip()):
            beside = getattr(beside, step)
        if beside is not None and beside.tag == "noscript":
            match = IMG.search(beside.html or "")
            return unescape(match[1] or match[2] or match[3]) if match else None
    return None


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
