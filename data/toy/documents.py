"""Drafts to documents: draws the images of many drafts in one go and encodes them as PNG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.shards.writer import Document, Image, Node, Text
from data.toy.drafts import Draft, Part, make_draft
from data.toy.draw import draw_glyphs, draw_scenes
from data.toy.glyphs import Glyph
from data.toy.png import encode_png
from data.toy.scenes import SIZE, Scene


def draw_images(images: Sequence[Scene | Glyph]) -> np.ndarray:
    """Return (N, 32, 32, 3) uint8, scenes and glyphs in any order."""
    drawn = np.zeros((len(images), SIZE, SIZE, 3), np.uint8)
    scenes = [i for i, image in enumerate(images) if isinstance(image, Scene)]
    glyphs = [i for i, image in enumerate(images) if isinstance(image, Glyph)]
    if scenes:
        drawn[scenes] = draw_scenes([image for image in images if isinstance(image, Scene)])
    if glyphs:
        drawn[glyphs] = draw_glyphs([image for image in images if isinstance(image, Glyph)])
    return drawn


def _node(part: Part) -> Node:
    if isinstance(part[0], str):
        return Text(part[0], bool(part[1]))
    return Image(tuple(int(frame) for frame in part), 4.0 if len(part) > 1 else None)


def finish(drafts: Sequence[Draft]) -> list[Document]:
    """Return the documents of drafts, keys still empty: the shard writer numbers them."""
    drawn = draw_images([image for draft in drafts for image in draft.images])
    images = iter([encode_png(image) for image in drawn])
    return [
        Document("", [_node(part) for part in draft.parts], [next(images) for _ in draft.images], draft.meta)
        for draft in drafts
    ]


def make_documents(seed: int, split: str, kind: str, indices: range) -> list[Document]:
    """Return documents `indices` of a kind (a key of `data.toy.drafts.MAKERS`) in a split."""
    return finish([make_draft(seed, split, kind, index) for index in indices])
