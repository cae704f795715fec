"""Sentences and pictures that belong to them, as MMC4 has it, to a page in reading order.

    sentences          A.   B.   C.        pictures  0 -> sentence 2, 1 -> sentence 1
    page               A. <picture 1> B. <picture 0> C.

MMC4 lists a document's pictures in an order that is not that of its text (the example is the one of its own README).
Here each picture stands right before its own sentence, so which picture a token sees (phi) follows from the page, and
the bytes are stored in the same order. open_flamingo's loader stacks the pictures as listed and puts the places in the
order of the sentences, which pairs the two above with each other's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.page import Node, Page, Picture, Text
from data.prepare.units import Dropped


@dataclass(frozen=True, slots=True)
class Listed:
    """A picture of a document as it is listed: what it is called, its sentence (from 0) and how similar the two are."""

    info: dict[str, Any]
    sentence: int
    similarity: float


def parse_document(body: Any) -> tuple[list[str], list[Listed]]:
    """The sentences and listed pictures of a line of MMC4. Raises Dropped where a type is wrong.

    `matched_text_index` is taken where it is given for every picture; otherwise the assignment is solved from
    `similarity_matrix` as MMC4 does it: one to one where there are enough sentences, else each to its best.
    """
    if not isinstance(body, dict):
        raise Dropped("line is no JSON object")
    sentences, infos, matrix = body.get("text_list"), body.get("image_info"), body.get("similarity_matrix")
    if not isinstance(sentences, list) or not all(isinstance(text, str) for text in sentences) or not sentences:
        raise Dropped("'text_list' is not a list of sentences")
    if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
        raise Dropped("'image_info' is not a list of objects")
    places = [info.get("matched_text_index") for info in infos]
    if not all(type(place) is int for place in places):
        places = list(_assigned(matrix, len(infos), len(sentences)))
    listed = []
    for number, (info, place) in enumerate(zip(infos, places, strict=True)):
        if not 0 <= place < len(sentences):
            raise Dropped("'matched_text_index' is outside the sentences")
        value = info.get("matched_sim")
        if not isinstance(value, int | float):
            value = _row(matrix, number, len(sentences))[place]
        listed.append(Listed(info, place, float(value)))
    return sentences, listed


def _row(matrix: Any, number: int, sentences: int) -> list[float]:
    row = matrix[number] if isinstance(matrix, list) and number < len(matrix) else None
    if not isinstance(row, list) or len(row) != sentences or not all(isinstance(x, int | float) for x in row):
        raise Dropped("'similarity_matrix' is not a row of numbers for each picture")
    return row


def _assigned(matrix: Any, pictures: int, sentences: int) -> list[int]:
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    if not pictures:
        return []
    table = np.array([_row(matrix, number, sentences) for number in range(pictures)])
    if pictures > sentences:
        return table.argmax(1).tolist()
    return linear_sum_assignment(table, maximize=True)[1].tolist()


def interleave(sentences: Sequence[str], pictures: Sequence[tuple[int, bytes]], meta: dict[str, Any]) -> Page:
    """A page of the sentences and of (sentence, bytes) of the kept pictures, as they were listed.

    Pictures of one sentence keep their order, and the last of them is the one that the sentence sees. Sentences are
    joined by a space; around a picture there is none. `meta["sentences"]` tells each stored picture's sentence.
    """
    order = sorted(range(len(pictures)), key=lambda k: pictures[k][0])  # stable: by sentence, then as listed
    page = Page("", [], [pictures[k][1] for k in order], meta | {"sentences": [pictures[k][0] for k in order]})
    run: list[str] = []
    waiting = 0
    for number, sentence in enumerate(sentences):
        while waiting < len(order) and pictures[order[waiting]][0] == number:
            _flush(page.nodes, run)
            page.nodes.append(Picture((waiting,)))
            waiting += 1
        if sentence.strip():
            run.append(sentence.strip())
    _flush(page.nodes, run)
    return page


def _flush(nodes: list[Node], run: list[str]) -> None:
    if run:
        nodes.append(Text(" ".join(run)))
        run.clear()


def add_text(nodes: list[Node], text: str, between: str) -> None:
    """Append a text; where the last node is one too (a picture between them is missing), they become one."""
    if nodes and isinstance(nodes[-1], Text):
        nodes[-1] = Text(f"{nodes[-1].text}{between}{text}")
    else:
        nodes.append(Text(text))
