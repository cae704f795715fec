"""open_flamingo's MMC4 shards, trained on as they are: a page out of one JSON line with its pictures inside.

A sample is `{key}.json`: MMC4's `text_list`, `image_info` and `similarity_matrix` (picture by sentence), each found
picture's bytes as base64 in `image_info[i]["image_base64"]`. What is notable: pictures are put before the sentence that
they belong to and kept in the order of the *sentences*. open_flamingo keeps them in the order of `image_info` and so
pairs a picture with another one's sentence wherever the two orders differ.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.errors import ContentError
from data.page import Node, Picture, Text

SMALLEST = 10_000  # bytes of an encoded picture; open_flamingo leaves out smaller ones, which are mostly icons


@dataclass(frozen=True, slots=True)
class Mmc4Rule:
    """Which pictures of an MMC4 page are kept: similarity to their sentence (CLIP ViT-L/14) and encoded bytes."""

    similarity: float = 0.24
    smallest: int = SMALLEST


@dataclass(frozen=True, slots=True)
class Base64Picture:
    """A picture as it lies in the JSON; decoded only when its place is in the window."""

    text: str

    def decode(self) -> bytes:
        """The picture's bytes. Raises ContentError when it is no base64 (some writers leave `b'...'` around it)."""
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
    """Whether a sample's JSON is an MMC4 line."""
    return "text_list" in body and "image_info" in body


def mmc4_page(body: Mapping[str, Any], rule: Mmc4Rule) -> tuple[list[Node], list[Base64Picture]]:
    """The nodes of a page and its pictures. Raises ValueError, in words for the reader, where the format is not kept.

    A picture belongs to its `matched_text_index`, or where there is none to the sentence it is most similar to.
    Sentences are joined by spaces. Raises ContentError when no picture is left.
    """
    sentences, infos = body["text_list"], body["image_info"]
    if not isinstance(sentences, list) or not all(isinstance(text, str) for text in sentences):
        raise ValueError("'text_list' is not a list of texts")
    if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
        raise ValueError("'image_info' is not a list of objects")
    matrix = body.get("similarity_matrix")
    by_sentence: dict[int, list[Base64Picture]] = {}
    for number, info in enumerate(infos):
        text = info.get("image_base64")
        if not isinstance(text, str):
            continue  # not found when the shard was made
        picture = Base64Picture(text)
        sentence, similarity = _match(number, info, matrix, len(sentences))
        if picture.size > rule.smallest and similarity >= rule.similarity:
            by_sentence.setdefault(sentence, []).append(picture)
    if not by_sentence:
        raise ContentError("no picture left", f"{len(infos)} pictures, none found and similar enough to its text")
    nodes: list[Node] = []
    pictures: list[Base64Picture] = []
    for place, sentence_text in enumerate(sentences):
        for picture in by_sentence.get(place, ()):
            nodes.append(Picture((len(pictures),)))
            pictures.append(picture)
        joined = nodes and isinstance(nodes[-1], Text)
        nodes.append(Text(f" {sentence_text}" if joined else sentence_text))
    return nodes, pictures


def _match(number: int, info: Mapping[str, Any], matrix: Any, sentences: int) -> tuple[int, float]:
    """(sentence, similarity) of a picture."""
    scores = matrix[number] if isinstance(matrix, list) and number < len(matrix) else None
    index = info.get("matched_text_index")
    if not isinstance(scores, list) or len(scores) != sentences or not all(isinstance(s, int | float) for s in scores):
        similarity = info.get("matched_sim")
        if type(index) is not int or not isinstance(similarity, int | float):
            raise ValueError(f"picture {number} has neither a row of {sentences} similarities nor a matched text")
        scores = None
    if type(index) is not int:
        index = max(range(sentences), key=scores.__getitem__) if scores else -1
    if not 0 <= index < sentences:
        raise ValueError(f"picture {number} belongs to sentence {index} of {sentences}")
    similarity = scores[index] if scores is not None else float(info["matched_sim"])
    return index, -math.inf if math.isnan(similarity) else float(similarity)
