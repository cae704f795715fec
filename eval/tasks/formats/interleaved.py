"""Questions about several images, whose positions the text marks: `<image 1>`, `<image 2>`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from eval.task import EncodedImage
from eval.tasks.formats.files import Item

MARK = re.compile(r"<image (\d)>")
Pieces = tuple[EncodedImage | None, str, tuple[tuple[EncodedImage, str], ...]]


def interleaved(question: str, item: Item) -> Pieces:
    """Return (first image, the text after it, further images each with the text after it).

    An item without a list of `images` has its one image at the head, and its text is left as it is.
    """
    images: Sequence[EncodedImage] = item.get("images", ())
    return _placed(question, images) if images else (item["image"], question, ())


def _placed(question: str, images: Sequence[EncodedImage]) -> Pieces:
    """Put the first image at the head, where text about it can see it, and the others where they are first named.

    A mark that is not an image's position reads "image 2" ("the image" where there is one); images that are not
    named at all follow the first.
    """
    named = list(dict.fromkeys(int(digit) for digit in MARK.findall(question)))
    ordered = [index for index in named if 1 < index <= len(images)]
    unnamed = [index for index in range(2, len(images) + 1) if index not in ordered]
    texts, start, waiting = [""], 0, set(ordered)
    for mark in MARK.finditer(question):
        index = int(mark[1])
        texts[-1] += question[start : mark.start()]
        start = mark.end()
        if index in waiting:
            waiting.remove(index)
            texts.append("")
        else:
            texts[-1] += f"image {index}" if len(images) > 1 else "the image"
    texts[-1] += question[start:]
    order = [*((index, "") for index in unnamed), *zip(ordered, texts[1:], strict=True)]
    first, rest = texts[0], [(images[index - 1], text) for index, text in order]
    if unnamed:  # these directly follow the first, so its text comes after the last of them
        rest[len(unnamed) - 1] = rest[len(unnamed) - 1][0], first
        first = ""
    return images[0], first, tuple(rest)


def without_first_mark(text: str) -> str:
    """Return the text without a mark of the first image at its beginning or end, as that image precedes it."""
    return text.strip().removeprefix("<image 1>").removesuffix("<image 1>").strip()
