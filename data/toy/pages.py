"""Drafts to pages: draws the pictures of many drafts in one go and encodes them as PNG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.shards.writer import Node, Page, Picture, Text
from data.toy.drafts import Draft, Part, make_draft
from data.toy.draw import draw_glyphs, draw_scenes
from data.toy.glyphs import Glyph
from data.toy.png import encode_png
from data.toy.scenes import SIZE, Scene


def draw_pictures(pictures: Sequence[Scene | Glyph]) -> np.ndarray:
    """(N, 32, 32, 3) uint8, scenes and glyphs in any order."""
    drawn = np.zeros((len(pictures), SIZE, SIZE, 3), np.uint8)
    scenes = [i for i, picture in enumerate(pictures) if isinstance(picture, Scene)]
    glyphs = [i for i, picture in enumerate(pictures) if isinstance(picture, Glyph)]
    if scenes:
        drawn[scenes] = draw_scenes([picture for picture in pictures if isinstance(picture, Scene)])
    if glyphs:
        drawn[glyphs] = draw_glyphs([picture for picture in pictures if isinstance(picture, Glyph)])
    return drawn


def _node(part: Part) -> Node:
    if isinstance(part[0], str):
        return Text(part[0], bool(part[1]))
    return Picture(tuple(int(frame) for frame in part), 4.0 if len(part) > 1 else None)


def finish(drafts: Sequence[Draft]) -> list[Page]:
    """The pages of drafts, keys still empty: the shard writer numbers them."""
    drawn = draw_pictures([picture for draft in drafts for picture in draft.pictures])
    images = iter([encode_png(picture) for picture in drawn])
    return [
        Page("", [_node(part) for part in draft.parts], [next(images) for _ in draft.pictures], draft.meta)
        for draft in drafts
    ]


def make_pages(seed: int, split: str, kind: str, indices: range) -> list[Page]:
    """Pages `indices` of a kind (a key of `data.toy.drafts.MAKERS`) in a split."""
    return finish([make_draft(seed, split, kind, index) for index in indices])
