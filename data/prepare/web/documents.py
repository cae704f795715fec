"""Turns a web page into a document: what the sources `html` and `warc` share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from data.prepare.images import ImageRule, from_base64
from data.prepare.units import Dropped, Tally
from data.prepare.web.dom import WebImage, WebPart, read_dom
from data.prepare.web.text_filters import RULES, WebRule, word_list
from data.shards.document import Document, Image, Node, Text
from data.shards.mmc4 import add_text
from flamingo.errors import UserError


def add_web_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of sources that read web pages."""
    parser.add_argument("--filters", choices=sorted(RULES), default="obelics", help="which rules (default obelics)")
    parser.add_argument("--min-images", type=int, default=1, help="documents with fewer are dropped (default 1)")
    parser.add_argument("--max-pixels", type=int, default=64_000_000, metavar="N", help="(default 64 million)")
    parser.add_argument("--flagged-words", metavar="FILE", help="words whose share is limited, one a line")
    parser.add_argument("--common-words", metavar="FILE", help="words whose share must be reached, one a line")
    parser.add_argument("--spam-words", metavar="FILE", help="words whose share of a paragraph is limited, one a line")
    parser.add_argument("--decode", action="store_true", help="decode every image whole and leave out damaged ones")


def check_web_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for invalid options, before anything is read."""
    if args.max_pixels < 1 or args.min_images < 0:
        raise UserError("--max-pixels must be at least 1 and --min-images not negative")
    word_list(args.flagged_words)
    word_list(args.common_words)
    word_list(args.spam_words)


def web_document(
    html: str, url: str, where: str, args: argparse.Namespace, fetch: Callable[[str], bytes], tally: Tally
) -> Document | None:
    """Return the document of a page, or None when it is dropped; the tally counts both. `fetch` may raise Dropped."""
    rule = RULES[args.filters]
    lists = tuple(map(word_list, (args.flagged_words, args.common_words, args.spam_words)))
    looks = ImageRule(
        min_side=rule.min_side,
        max_side=rule.max_side,
        max_pixels=args.max_pixels,
        max_aspect=rule.max_aspect,
        decode=args.decode,
        plain=rule.plain,
    )
    seen: set[WebPart] = set()
    nodes: list[Node] = []
    images: list[bytes] = []
    urls: list[str] = []
    for index, part in enumerate(read_dom(html, url)):
        if part in seen:
            continue  # a menu or an image that is repeated on the page
        seen.add(part)
        if isinstance(part, str):
            if rule.paragraph.reason(part, *lists):
                continue
            add_text(nodes, part, "\n\n")
            continue
        try:
            images.append(looks.check(_bytes(part, rule, fetch)))
        except Dropped as dropped:
            tally.drop_image(dropped.reason, f"{where} image {index}")
            continue
        nodes.append(Image((len(images) - 1,)))
        urls.append(part.url if not part.url.startswith("data:") else "data:")
    text = "\n\n".join(node.text for node in nodes if isinstance(node, Text))
    reason = (
        "no text"
        if not text
        else f"fewer than {args.min_images} images left"
        if len(images) < args.min_images
        else f"more than {rule.max_images} images"
        if len(images) > rule.max_images
        else rule.document.reason(text, *lists)
    )
    if reason:
        tally.drop_document(reason, where)
        return None
    return Document("", nodes, images, ({"url": url} if url else {}) | {"images": urls})


def _bytes(image: WebImage, rule: WebRule, fetch: Callable[[str], bytes]) -> bytes:
    if image.url.startswith("data:"):
        return from_base64(image.url)
    address = image.url.lower()
    if word := next((word for word in rule.banned if word in address), None):
        raise Dropped(f"image with {word!r} in its address")
    if 0 < image.width < rule.min_side or 0 < image.height < rule.min_side:
        raise Dropped(f"image shown with a side below {rule.min_side} pixels")
    return fetch(image.url)


def page_address(html: str) -> str:
    """Return the address that a saved page claims: its canonical link, or the one noted by the browser."""
    for pattern in (
        r"""<link[^>]{0,300}?rel=["']?canonical["']?[^>]{0,300}?href=["']([^"'>]{1,2000})["']""",
        r"""<link[^>]{0,300}?href=["']([^"'>]{1,2000})["'][^>]{0,300}?rel=["']?canonical["']?""",
        r"""<!-- saved from url=\(\d+\)(\S{1,2000}) -->""",
    ):
        if match := re.search(pattern, html[:100_000], re.IGNORECASE):
            return match[1]
    return ""


def lookup_of(args: argparse.Namespace) -> str:
    """Return the path of the lookup of images by address."""
    return str(Path(args.work) / "images.sqlite")
