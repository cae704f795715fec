"""Markdown in all its forms: what a reader sees as an image is one, and nothing else is."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.prepare.markdown import Shown, parts_of
from data.prepare.units import Dropped
from tests.data.sources import flat, jpeg, prepare

IMAGE = jpeg(1)
DATA = "data:image/jpeg;base64," + base64.b64encode(IMAGE).decode()
I = object()  # noqa: E741 (an image in an expected document)


def document(folder: Path, text: str, name: str = "doc.md", faults: int = 0) -> list[object]:
    """The texts of a document, I for its image p.jpg, or the reason why it was dropped."""
    root = folder / "in"
    for path in ("p.jpg", "my p.jpg", "a_(1).jpg", "a(1.jpg", "deep/vault.jpg", "50%20off.jpg", "a#1.jpg", "ä.jpg"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(IMAGE)
    (root / name).write_text(text, encoding="utf-8", newline="")
    (root / "z.txt").write_text("another")
    done = prepare(folder / "out", "folder", root, faults=faults)
    if done.dropped:
        return list(done.dropped)
    assert set(done.documents[0].images) <= {IMAGE}
    return [part if isinstance(part, str) else I for part in flat(done.documents[0])]


SHOWN: dict[str, tuple[str, list[object]]] = {
    "reference": ("See ![alt][r1].\n\n[r1]: p.jpg\n", ["See", I, "."]),
    "collapsed reference": ("See ![r1][].\n\n[R1]: <my p.jpg> 'My title'\n", ["See", I, "."]),
    "shortcut reference, defined first": ("[r1]: p.jpg\n    (title)\n\n![r1] is it", [I, "is it"]),
    "a definition in a quotation": ("![a][r]\n\n> quoted\n>\n> [r]: p.jpg\n", [I, "> quoted\n>"]),
    "a link's definition stays": ("![](p.jpg)[l]\n\n[l]: http://x\n", [I, "[l]\n\n[l]: http://x"]),
    "title": ("a ![](p.jpg \"T (1) ')\") ![](p.jpg 'b') ![](p.jpg (c)) z", ["a", I, I, I, "z"]),
    "parentheses": (r"![](a_(1).jpg) ![](a\(1.jpg) ![x](<a_(1).jpg>)", [I, I, I]),
    "one parenthesis": ("![](a(1.jpg) z", [I, "z"]),
    "angle brackets": ("![](<my p.jpg>) ![]( <p.jpg> )", [I, I]),
    "unfinished": ("a ![](<my p.jpg) b ![](p.jpg 'T) c", ["a", I, "b", I, "c"]),
    "deep": ("> " * 60 + "a ![](p.jpg)" + "[" * 20, ["> " * 60 + "a", I, "[" * 20]),
    "blanks": ('![an image](my p.jpg "T") b ![](my%20p.jpg) c', [I, "b", I, "c"]),
    "escapes": ("![](50%20off.jpg)![](a#1.jpg)![](a%231.jpg)![](%C3%A4.jpg)![](ä.jpg)", [I, I, I, I, I]),
    "entity": ("![](p&#46;jpg)", [I]),
    "query and fragment": ("![](p.jpg?raw=true) ![](p.jpg#dark) ![](./p.jpg)", [I, I, I]),
    "backslash": (r"![](deep\vault.jpg)", [I]),
    "below the folder": ("![](/p.jpg)", [I]),
    "brackets in the label": (r"![a [b] \] c](p.jpg) ![![x](p.jpg)](p.jpg)", [I, I]),
    "lines in the label": ("> ![a\n> b](p.jpg\n> 'x') c", [">", I, "c"]),
    "a link of an image": ("a [![alt](p.jpg)](http://x/p.jpg 't') b", ["a", I, "b"]),
    "a link of an image by reference": ("[![alt][i]][l]\n\n[i]: p.jpg\n[l]: http://x\n", [I]),
    "a link of an image and words": ("a [![](p.jpg) words](http://x) b", ["a", I, "words b"]),
    "img": ('See <img src="p.jpg"> here.', ["See", I, "here."]),
    "img, other forms": ("a <IMG alt='>' SRC=p.jpg /> b <img\nwidth=1 src='./p.jpg'/>c", ["a", I, "b", I, "c"]),
    "img in a block": ('<p align="c">\n<img src="p.jpg">\n</p>', ['<p align="c">', I, "</p>"]),
    "img in a picture": (
        '<picture><source srcset="n.webp"><img src="p.jpg"></picture>',
        ['<picture><source srcset="n.webp">', I, "</picture>"],
    ),
    "Markdown in a block": ("<div>\n![](p.jpg)\n![[p.jpg]]\n</div>", ["<div>", I, I, "</div>"]),
    "wiki": ("a ![[p.jpg]] b ![[p.jpg|200]] c ![[deep/vault.jpg|x|9x9]]", ["a", I, "b", I, "c", I]),
    "wiki, anywhere in the vault": ("![[Vault.JPG]]![[my p.jpg]]", [I, I]),
    "wiki, another note": (
        "a ![[note]] b ![[note.md#part]] c ![[v1.2]]",
        ["a ![[note]] b ![[note.md#part]] c ![[v1.2]]"],
    ),
    "data": (f"a ![]({DATA}) <img src='{DATA}'> b", ["a", I, I, "b"]),
    "a table": (
        "|a|b|\n|-|-|\n|![](p.jpg)|`![](n.jpg)`|\n|`|![](p.jpg)|",
        ["|a|b|\n|-|-|\n|", I, "|`![](n.jpg)`|\n|`|", I, "|"],
    ),
    "cells with its marks": ("|a|b|\n|-|-|\n|! < a|![](p.jpg)|", ["|a|b|\n|-|-|\n|! < a|", I, "|"]),
    "a wiki image in a table": ("|a|\n|-|\n|![[p.jpg\\|9]]|", ["|a|\n|-|\n|", I, "|"]),
    "blocks": ("# T ![](p.jpg)\n- x\n  1. ![](p.jpg) #\n\n>![](p.jpg)", ["# T", I, "- x\n  1.", I, "#\n\n>", I]),
    "line ends": ("a\r\n![](p.jpg)\r\rb ![](p.jpg)", ["a", I, "b", I]),
    "tabs and byte-order mark": ("\ufeff-\ta ![](p.jpg)\n\n\tb ![](p.jpg)", ["-\ta", I, "b", I]),
}
TEXT = {
    "a fence": "```md\n![](p.jpg)\n<img src=p.jpg>\n![[p.jpg]]\n```",
    "a fence of tildes that does not end": "~~~\n![](p.jpg)",
    "an indented block": "a\n\n    ![](p.jpg)",
    "inline code": "a `![](p.jpg)` `` ` ![[p.jpg]] `` `<img src='p.jpg'>`",
    "escaped": r"\![a](p.jpg) !\[a](p.jpg) \!\[\[p.jpg]] \<img src='p.jpg'>",
    "a comment": "<!-- ![](p.jpg) <img src=p.jpg> -->\n\na <!-- <img src=p.jpg> ![](p.jpg) --> b",
    "code in HTML": "<pre>\n![](p.jpg)\n</pre>",
    "a link": "[a](p.jpg) and wow![x] and ![^1]",
}
REASONS = {
    "![](none.jpg)": "image is missing",
    "![](http://x/p.jpg)": "image is missing",
    "![[none.png]]": "image is missing",
    "![[film.mp4]]": "image is missing",
    "![[doc.md.pdf]]": "image is missing",
    "![](../p.jpg)": "image's name leads out of its folder",
    "![a][nowhere]": "Markdown image that cannot be read",
    "![a](<p.jpg": "Markdown image that cannot be read",
    "![a](my film 'open)": "Markdown image that cannot be read",
    "![]()": "image without an address",
    "a <img alt='x'> b": "image without an address",
    "![](data:image/png;base64,###)": "image's base64 cannot be read",
    "![](data:image/svg+xml,%3Csvg%3E)": "image's base64 cannot be read",
    "\n\n" + "> " * 3000 + "![](p.jpg)": "Markdown nested too deep",
}


@pytest.mark.parametrize("form", SHOWN)
def test_forms_of_images(tmp_path: Path, form: str) -> None:
    text, expected = SHOWN[form]
    # A document of images alone teaches nothing: `verify` says so.
    assert document(tmp_path, text, faults=not any(isinstance(part, str) for part in expected)) == expected


@pytest.mark.parametrize("form", TEXT)
def test_what_is_no_image(tmp_path: Path, form: str) -> None:
    assert document(tmp_path, TEXT[form]) == [TEXT[form]]


@pytest.mark.parametrize("text", REASONS)
def test_what_cannot_be_shown_is_counted(tmp_path: Path, text: str) -> None:
    assert document(tmp_path, f"words {text} words") == [REASONS[text]]


def test_plain_text_has_no_indented_code(tmp_path: Path) -> None:
    assert document(tmp_path, "a\n\n    ![](p.jpg)", "doc.txt") == ["a", I]
    assert document(tmp_path / "2", "a ![](p.jpg)", "DOC.MD") == ["a", I]


MARKS = [
    *("![", "[", "]", "](", "(", ")", "[[", "]]", "[r]: p.jpg\n", "p.jpg", "`", "```\n", "\\", "*", "a", "ä", "&amp;"),
    *("<img src=", ">", "<!--", "-->", "<div>", "\n", "\r\n", "> ", "- ", "|", "|-|\n", "\t", " ", "\0"),
]
PIECES = st.sampled_from(MARKS)


@given(st.lists(PIECES, max_size=24).map("".join), st.booleans())
@example("> [r]: p.jpg\n![r]", False)
def test_any_text_is_read_or_dropped_with_a_reason(text: str, plain: bool) -> None:
    try:
        parts = list(parts_of(text, plain=plain))
    except Dropped:
        return
    rest = text
    for part in parts:  # nothing is added or moved: each part is found again, in order
        if isinstance(part, Shown):
            assert 0 <= part.begin < part.end <= len(text)
            continue
        for character in part:
            found = rest.find(character)
            assert found >= 0
            rest = rest[found + 1 :]
    if "![" not in text and "<img" not in text:
        assert parts == [text]


def oracle(text: str) -> int:
    """Images that markdown-it itself shows."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return sum(child.type == "image" for token in tokens for child in token.children or [])


@given(st.lists(PIECES.filter(lambda piece: piece[0] not in "<-["), max_size=16).map("".join))
def test_every_image_of_commonmark_is_shown(text: str) -> None:
    text = f"{text}\n\n![](p.jpg) {text} ![b](q.jpg)"
    try:
        shown = [part for part in parts_of(text) if isinstance(part, Shown)]
    except Dropped:
        return
    assert len(shown) >= oracle(text)
