"""Where a Markdown document shows images, as markdown-it reads it, with the places in its text.

Images in all of CommonMark's forms, `<img>`, and Obsidian's `![[image.png]]`; never those in code, comments or behind
a backslash. Addresses with blanks (`![](my image.png)`), which CommonMark does not allow, are images too, since their
writers meant them to be.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from html import unescape
from typing import Any

from data.prepare.inputs import required
from data.prepare.units import Dropped
from data.prepare.web.dom import WebImage, read_dom
from data.shards.samples import VIDEOS
from flamingo.vision.image_files import SUFFIXES

_LABEL = r"!\[(?:[^\[\]\\]|\\.|\[[^\[\]]*\])*\]"
WIKI = re.compile(r"!\[\[([^\[\]|\n]+)(?:\|[^\[\]\n]*)?\]\]")
_NAME = rf"[^\n<>]*?\.(?:{'|'.join(sorted(SUFFIXES))})(?:[?#][^\s()]*)?"
LOOSE = re.compile(rf"""{_LABEL}\([ \t]*<?({_NAME})>?(?:[ \t]+["'(][^\n]*?)?[ \t]*\)""", re.IGNORECASE)
BROKEN = re.compile(rf"{_LABEL}(?:\(|\[(?!\^))")  # looks like an image, and is none: its address or definition is wrong
NO_MARKDOWN = re.compile(r"<!--.*?(?:-->|\Z)|<(pre|code|script|style|textarea)\b.*?(?:</\1\s*>|\Z)", re.I | re.S)
NO_HTML = re.compile(r"<!--.*?(?:-->|\Z)|<(script|style|textarea)\b.*?(?:</\1\s*>|\Z)", re.I | re.S)
IMG = re.compile(r"""<(?:amp-)?img\b(?:[^<>"']|"[^"]*"|'[^']*')*>""", re.IGNORECASE)
MAYBE = re.compile(r"!\[|<(?:amp-)?img\b", re.IGNORECASE)  # what every image begins with
LINE_END = re.compile(r"\r\n?|\n")
EMBEDDED = SUFFIXES | {*VIDEOS, "mp3", "wav", "ogg", "m4a", "flac", "3gp", "ogv", "pdf"}  # besides: other notes


@dataclass(frozen=True, slots=True)
class Shown:
    """An image in a text: its address, between which characters it is written, and whether as `![[address]]`.

    Without an address it is only the frame of one (the link around it, its definition elsewhere), to be left out.
    """

    begin: int
    end: int
    address: str | None
    wiki: bool = False


Part = str | Shown


def parts_of(text: str, *, plain: bool = False) -> Iterator[Part]:
    """Yield the texts and images of a document in order; a text has neither images nor the frames around them.

    In `plain` text four blanks in front of a line do not make it code. Raises Dropped for what looks like an image and
    cannot be read, since it would be learnt as text.
    """
    run, at = "", 0
    for shown in sorted(_shown(text, plain), key=lambda shown: (shown.begin, shown.end)):
        run += text[at : max(at, shown.begin)]
        at = max(at, shown.end)
        if shown.address is not None:
            if not shown.address:
                raise Dropped("image without an address")
            yield run
            yield shown
            run = ""
    yield run + text[at:]


def _shown(text: str, plain: bool) -> list[Shown]:
    if not MAYBE.search(text):
        return []
    env: dict[str, Any] = {}
    try:
        tokens = _parser(plain).parse(text, env)
    except RecursionError:
        raise Dropped("Markdown nested too deep") from None
    lines = [0, *(match.end() for match in LINE_END.finditer(text)), len(text)]
    shown: list[Shown] = []
    labels: set[str] = set()
    at = 0
    for token in tokens:
        if token.type not in ("inline", "html_block") or token.map is None:
            continue
        if "!" not in token.content and "<" not in token.content:
            continue  # nothing that could be mistaken for the beginning of an image in the cell behind it
        # The cells of a table are on one line: each is looked for behind the one before.
        places = _places(token.content, text, lines, token.map[0], at)
        at = places[-1]
        spans = _in_html(token.content) if token.type == "html_block" else _in_line(token.children or [], labels)
        shown += [Shown(places[s.begin], places[s.end - 1] + 1, s.address, s.wiki) for s in spans]
    for label in labels:
        first, last = env["references"][label]["map"]
        shown.append(Shown(lines[first], lines[last], None))
    return shown


def _places(content: str, text: str, lines: list[int], first: int, at: int) -> list[int]:
    """Return the place in `text` of each character of a token, whose lines lack the marks of the blocks around it."""
    places: list[int] = []
    for line_index, line in enumerate(content.split("\n"), first):
        line_index = min(line_index, len(lines) - 2)
        at, end = max(at, lines[line_index]), lines[line_index + 1]
        for character in line:
            place = text.find(character, at, end)  # what is not there stands for a tab or an escape
            at = at if place < 0 else place
            places.append(at)
            at += place >= 0
        places.append(at)
    return places


def _in_line(tokens: list[Any], labels: set[str]) -> Iterator[Shown]:
    """Yield the images of a paragraph, a heading or a cell, and the links around them; add their labels to `labels`."""
    images = [
        token
        for token in tokens
        if token.type in ("image", "embed") or (token.type == "html_inline" and IMG.match(token.content))
    ]
    for token in images:
        begin, end = token.meta["span"]
        address = _address(token.content) if token.type == "html_inline" else token.attrGet("src")
        if token.type != "html_inline" and address is None:
            raise Dropped("Markdown image that cannot be read")
        labels |= {token.meta["label"]} if "label" in token.meta else set()
        yield Shown(begin, end, address, token.info == "wiki")
    starts = [token.meta["span"][0] for token in images]
    for token in tokens:
        if token.type == "link_open" and "label_end" in token.meta:
            begin, end = token.meta["span"]
            if bisect_right(starts, end) > bisect_right(starts, begin):
                labels |= {token.meta["label"]} if "label" in token.meta else set()
                yield Shown(begin, begin + 1, None)
                yield Shown(token.meta["label_end"], end, None)


def _in_html(content: str) -> Iterator[Shown]:
    """Yield the images of a block of HTML; Markdown in it, which most programs do not show, is meant all the same."""
    for match in _outside(IMG, content, NO_HTML):
        yield Shown(*match.span(), _address(match[0]))
    for pattern in (WIKI, LOOSE):
        for match in _outside(pattern, content, NO_MARKDOWN):
            if pattern is LOOSE or _is_media(match[1]):
                yield Shown(*match.span(), unescape(match[1].strip()), pattern is WIKI)


def _outside(pattern: re.Pattern[str], content: str, skipped: re.Pattern[str]) -> Iterator[re.Match[str]]:
    spans = [match.span() for match in skipped.finditer(content)]
    for match in pattern.finditer(content):
        if not any(begin <= match.start() < end for begin, end in spans):
            yield match


def _address(tag: str) -> str:
    """Return the address of an `<img>` by the rules for web pages, "" when it has none."""
    images = [part for part in read_dom(tag) if isinstance(part, WebImage)]
    return images[0].url if images else ""


def _is_media(name: str) -> bool:
    """Return whether `![[name]]` shows media and not another note."""
    return name.partition("#")[0].strip().rpartition(".")[2].lower() in EMBEDDED


@lru_cache(maxsize=2)
def _parser(plain: bool) -> Any:
    """Return a parser whose tokens of images and links know their span in the line they are in."""
    markdown = required("markdown_it", "reading Markdown")
    rules = required("markdown_it.rules_inline", "reading Markdown")
    parser = markdown.MarkdownIt("commonmark", {"store_labels": True, "maxNesting": 10**6}).enable("table")
    if plain:
        parser.disable("code")
    for name in ("image", "link", "html_inline"):
        parser.inline.ruler.at(name, _with_span(getattr(rules, name)))
    parser.inline.ruler.after("image", "embed", _with_span(_embed))
    # Which addresses may be shown and how they are written decides a browser; here they are names of files.
    parser.validateLink = lambda address: True
    parser.normalizeLink = lambda address: address
    return parser


def _with_span(rule: Callable[[Any, bool], bool]) -> Callable[[Any, bool], bool]:
    def spanned(state: Any, silent: bool) -> bool:
        begin, count = state.pos, len(state.tokens)
        if not rule(state, silent):
            return False
        for token in state.tokens[count:]:
            token.meta.setdefault("span", (begin, state.pos))
            if token.type == "link_open":
                token.meta.setdefault("label_end", _label_end(state, begin))
        return True

    return spanned


def _label_end(state: Any, begin: int) -> int:
    return int(state.md.helpers.parseLinkLabel(state, begin, True)) if state.src[begin] == "[" else begin


def _embed(state: Any, silent: bool) -> bool:
    """Read what CommonMark takes for text: `![[name]]`, addresses with blanks; mark what only looks like an image."""
    if not state.src.startswith("![", state.pos):
        return False
    wiki = WIKI.match(state.src, state.pos, state.posMax)
    if wiki and not _is_media(wiki[1]):
        return False
    match = wiki or LOOSE.match(state.src, state.pos, state.posMax) or BROKEN.match(state.src, state.pos, state.posMax)
    if match is None:
        return False
    if not silent:
        token = state.push("embed", "img", 0)
        if match.re is not BROKEN:
            token.attrSet("src", match[1].strip())
        token.info = "wiki" if wiki else ""
    state.pos = match.end()
    return True
