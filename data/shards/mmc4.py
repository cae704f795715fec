"""Turns MMC4's JSON into documents in reading order: sentences, and images that each belong to one of them.

    sentences          A.   B.   C.        images  0 -> sentence 2, 1 -> sentence 1
    document               A. <image 1> B. <image 0> C.

MMC4 lists a document's images in an order that is not that of its text (the example is from its own README). Here each
image stands right before its own sentence, so which image a token sees (phi) follows from the document. open_flamingo
stacks the images as listed and puts the `<image>` tokens in the order of the sentences, which pairs the two above with
each other's text.

This serves `python -m data prepare` and training on open_flamingo's shards in place, where the bytes of each image that
was found are base64 in `image_info[i]["image_base64"]`. `Mmc4Rule` has the options in which the two differ.
"""

from __future__ import annotations

import binascii
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from data.errors import ContentError
from data.shards.document import Image, Node, Text

T = TypeVar("T")
SMALLEST = 11_000  # bytes of an encoded image; open_flamingo drops smaller ones, which are mostly icons
MATCHING = ("listed", "assigned")
MARKER = re.compile(r"_!_IMAGE(\d+)_!_")


@dataclass(frozen=True, slots=True)
class Mmc4Rule:
    """Which images are kept, and which sentence an image belongs to.

    `similarity`: the least to its sentence (CLIP ViT-L/14, not scaled by 100). `smallest`: the fewest encoded bytes.
    `matching`: an image's sentence is its `matched_text_index`; where that is not given, "listed" takes the sentence
    it is most similar to, "assigned" what MMC4 itself does: unless every image of the document has one, they are
    assigned one to one for the greatest sum of similarities (each to its best where images outnumber sentences).
    """

    similarity: float = 0.24
    smallest: int = SMALLEST
    matching: str = "listed"


class Malformed(ValueError):  # noqa: N818 (a description of the document)
    """A document in a wrong format. `reason` is a phrase to count by, the message has the details."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Listed:
    """An image as a document lists it: its entry, its sentence (from 0) and how similar the two are."""

    info: dict[str, Any]
    sentence: int
    similarity: float


@dataclass(frozen=True, slots=True)
class Base64Image:
    """An image as the JSON holds it; decoded only when its token is in the crop."""

    text: str

    def decode(self) -> bytes:
        """Return the image's bytes. Raises ContentError for invalid base64 (some writers leave `b'...'` around it)."""
        text = self.text
        if text[:2] in ("b'", 'b"') and text[-1:] == text[1]:
            text = text[2:-1]
        try:
            return binascii.a2b_base64(text)
        except (binascii.Error, ValueError) as error:
            raise ContentError("undecodable", f"base64 of {len(self.text)} characters: {error}") from None

    @property
    def size(self) -> int:
        """Bytes that it decodes to."""
        return len(self.text) * 3 // 4 - self.text[-2:].count("=")


def is_mmc4(body: Mapping[str, Any]) -> bool:
    """Return whether a sample's JSON is an MMC4 document, or one of open_flamingo's sequences made by ChatGPT."""
    return ("text_list" in body and "image_info" in body) or "is_gpt" in body


def read_document(
    body: Mapping[str, Any], matching: str = "listed", wanted: Callable[[dict[str, Any]], bool] | None = None
) -> tuple[list[str], list[Listed]]:
    """Return the sentences and the listed images of a document (only the `wanted` ones). Raises Malformed."""
    sentences, infos, matrix = body.get("text_list"), body.get("image_info"), body.get("similarity_matrix")
    if not isinstance(sentences, list) or not all(isinstance(text, str) for text in sentences) or not sentences:
        raise Malformed("'text_list' is not a list of sentences")
    if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
        raise Malformed("'image_info' is not a list of objects")
    sentence_of = [info.get("matched_text_index") for info in infos]
    if matching == "assigned" and not all(type(sentence) is int for sentence in sentence_of):
        sentence_of = list(_assigned(matrix, len(infos), len(sentences)))
    listed = []
    for number, (info, sentence) in enumerate(zip(infos, sentence_of, strict=True)):
        if wanted is not None and not wanted(info):
            continue
        if type(sentence) is not int:
            row = _row(matrix, number, len(sentences))
            sentence = max(range(len(sentences)), key=row.__getitem__)
        if not 0 <= sentence < len(sentences):
            detail = f"image {number} belongs to sentence {sentence} of {len(sentences)}"
            raise Malformed("'matched_text_index' is outside the sentences", detail)
        similarity = info.get("matched_sim") if info.get("matched_text_index") == sentence else None
        if not isinstance(similarity, int | float):
            similarity = _row(matrix, number, len(sentences))[sentence]
        listed.append(Listed(info, sentence, -math.inf if math.isnan(similarity) else float(similarity)))
    return sentences, listed


def _row(matrix: Any, number: int, sentences: int) -> list[float]:
    row = matrix[number] if isinstance(matrix, list) and number < len(matrix) else None
    if not isinstance(row, list) or len(row) != sentences or not all(isinstance(x, int | float) for x in row):
        raise Malformed(
            "'similarity_matrix' is not a row of numbers for each image",
            f"image {number} has neither a row of {sentences} similarities nor a matched text",
        )
    return row


def _assigned(matrix: Any, images: int, sentences: int) -> list[int]:
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    if not images:
        return []
    table = np.nan_to_num(np.array([_row(matrix, number, sentences) for number in range(images)]), nan=-1.0)
    if images > sentences:
        return table.argmax(1).tolist()
    return linear_sum_assignment(table, maximize=True)[1].tolist()


def interleave(sentences: Sequence[str], placed: Sequence[tuple[int, T]]) -> tuple[list[Node], list[T], list[int]]:
    """Return (nodes, images, each image's sentence) of a document, given its sentences and (sentence, image) as listed.

    Images of one sentence keep their order, and the last of them is the one that the sentence sees. Sentences are
    joined by a space; around an image there is none.
    """
    order = sorted(range(len(placed)), key=lambda k: placed[k][0])  # stable: by sentence, then as listed
    nodes: list[Node] = []
    run: list[str] = []
    waiting = 0
    for number, sentence in enumerate(sentences):
        while waiting < len(order) and placed[order[waiting]][0] == number:
            _flush(nodes, run)
            nodes.append(Image((waiting,)))
            waiting += 1
        if stripped := sentence.strip():
            run.append(stripped)
    _flush(nodes, run)
    return nodes, [placed[k][1] for k in order], [placed[k][0] for k in order]


def _flush(nodes: list[Node], run: list[str]) -> None:
    if run:
        nodes.append(Text(" ".join(run)))
        run.clear()


def add_text(nodes: list[Node], text: str, between: str) -> None:
    """Append a text; where the last node is one too (an image between them is missing), they become one."""
    if nodes and isinstance(nodes[-1], Text):
        nodes[-1] = Text(f"{nodes[-1].text}{between}{text}")
    else:
        nodes.append(Text(text))


def generated(body: Mapping[str, Any], image: Callable[[int, Any], T | None]) -> tuple[list[Node], list[T]]:
    """Return (nodes, images) of a sequence made by ChatGPT: text with markers `_!_IMAGE1_!_`, and an `image_map`.

    `image(number, base64)` returns the image of a marker, or None to leave it out. Raises Malformed.
    """
    text, items = body.get("example"), body.get("image_map")
    if not isinstance(text, str) or not isinstance(items, dict):
        raise Malformed("'example' is not text or 'image_map' not an object")
    nodes: list[Node] = []
    images: list[T] = []
    for number, part in enumerate(MARKER.split(text)):  # text, number, text, number, ...
        if number % 2 == 0:
            if part.strip():
                add_text(nodes, part.strip(), " ")
            continue
        item = items.get(f"_!_IMAGE{part}_!_")
        decoded = image(int(part), item.get("base64_image") if isinstance(item, dict) else None)
        if decoded is not None:
            nodes.append(Image((len(images),)))
            images.append(decoded)
    return nodes, images


def mmc4_document(body: Mapping[str, Any], rule: Mmc4Rule) -> tuple[list[Node], list[Base64Image]]:
    """Return (nodes, images) of MMC4 JSON that holds its images; those that were not found are left out.

    Raises Malformed, and ContentError when no image is left.
    """
    if "is_gpt" in body:
        nodes, images = generated(body, lambda _, text: Base64Image(text) if isinstance(text, str) else None)
        if not images:
            raise ContentError("no image left", "no marker has its image")
        return nodes, images
    sentences, listed = read_document(body, rule.matching, lambda info: isinstance(info.get("image_base64"), str))
    candidates = [(entry.sentence, entry.similarity, Base64Image(entry.info["image_base64"])) for entry in listed]
    kept = [
        (sentence, image)
        for sentence, similarity, image in candidates
        if image.size >= rule.smallest and similarity >= rule.similarity
    ]
    if not kept:
        count = len(body["image_info"])
        raise ContentError("no image left", f"{count} images, none of them found and similar enough to its text")
    nodes, images, _ = interleave(sentences, kept)
    return nodes, images
