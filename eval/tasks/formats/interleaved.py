"""Questions about several pictures, whose places the text marks: `<image 1>`, `<image 2>`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from eval.task import Picture
from eval.tasks.formats.files import Item

MARK = re.compile(r"<image (\d)>")
Pieces = tuple[Picture | None, str, tuple[tuple[Picture, str], ...]]


def interleaved(question: str, item: Item) -> Pieces:
    """(first picture, the text behind it, further pictures each with the text behind it).

    An item without a list of `pictures` has its one picture at the head, and its text is left as it is.
    """
    pictures: Sequence[Picture] = item.get("pictures", ())
    return _placed(question, pictures) if pictures else (item["picture"], question, ())


def _placed(question: str, pictures: Sequence[Picture]) -> Pieces:
    """The first picture stands at the head, where text about it can see it; the others where they are named first.

    A mark that is not a picture's place reads "picture 2" ("the picture" where there is one); pictures that are not
    named at all follow the first.
    """
    named = list(dict.fromkeys(int(found) for found in MARK.findall(question)))
    placed = [number for number in named if 1 < number <= len(pictures)]
    unnamed = [number for number in range(2, len(pictures) + 1) if number not in placed]
    texts, start, waiting = [""], 0, set(placed)
    for mark in MARK.finditer(question):
        number = int(mark[1])
        texts[-1] += question[start : mark.start()]
        start = mark.end()
        if number in waiting:
            waiting.remove(number)
            texts.append("")
        else:
            texts[-1] += f"picture {number}" if len(pictures) > 1 else "the picture"
    texts[-1] += question[start:]
    order = [*((number, "") for number in unnamed), *zip(placed, texts[1:], strict=True)]
    first, rest = texts[0], [(pictures[number - 1], text) for number, text in order]
    if unnamed:  # these stand right behind the first, so its text goes behind the last of them
        rest[len(unnamed) - 1] = rest[len(unnamed) - 1][0], first
        first = ""
    return pictures[0], first, tuple(rest)


def without_first_mark(text: str) -> str:
    """The text without a mark of the first picture at its beginning or end, as that picture stands ahead of it."""
    return text.strip().removeprefix("<image 1>").removesuffix("<image 1>").strip()
