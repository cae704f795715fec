"""Questions about several images, whose places the text marks: `<image 1>`, `<image 2>`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from eval.task import EncodedImage
from eval.tasks.formats.files import Item

MARK = re.compile(r"<image (\d)>")
Pieces = tuple[EncodedImage | None, str, tuple[tuple[EncodedImage, str], ...]]


def interleaved(question: str, item: Item) -> Pieces:
    """(first image, the text behind it, further images each with the text behind it).

    An item without a list of `images` has its one image at the head, and its text is left as it is.
    """
    images: Sequence[EncodedImage] = item.get("images", ())
    return _placed(question, images) if images else (item["image"], question, ())


def _placed(question: str, images: Sequence[EncodedImage]) -> Pieces:
    """The first image stands at the head, where text about it can see it; the others where they are named first.

    A mark that is not an image's place reads "image 2" ("the image" where there is one); images that are not
    named at all follow the first.
    """
    named = list(dict.fromkeys(int(found) for found in MARK.findall(question)))
    placed = [number for number in named if 1 < number <= len(images)]
    unnamed = [number for number in range(2, len(images) + 1) if number not in placed]
    texts, start, waiting = [""], 0, set(placed)
    for mark in MARK.finditer(question):
        number = int(mark[1])
        texts[-1] += question[start : mark.start()]
        start = mark.end()
        if number in waiting:
            waiting.remove(number)
            texts.append("")
        else:
            texts[-1] += f"image {number}" if len(images) > 1 else "the image"
    texts[-1] += question[start:]
    order = [*((number, "") for number in unnamed), *zip(placed, texts[1:], strict=True)]
    first, rest = texts[0], [(images[number - 1], text) for number, text in order]
    if unnamed:  # these stand right behind the first, so its text goes behind the last of them
        rest[len(unnamed) - 1] = rest[len(unnamed) - 1][0], first
        first = ""
    return images[0], first, tuple(rest)


def without_first_mark(text: str) -> str:
    """The text without a mark of the first image at its beginning or end, as that image stands ahead of it."""
    return text.strip().removeprefix("<image 1>").removesuffix("<image 1>").strip()
