"""Page makers: what a page shows and says, before any picture is drawn.

A draft is cheap and a pure function of (seed, split, kind, index); `data.toy.pages` draws many drafts' pictures at
once. Split "heldout" means pictures of another stream for every kind, and for binding also names and glyph classes
that no training page has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from data.toy import glyphs, textpages
from data.toy.clips import clip_caption, draw_clip
from data.toy.glyphs import Glyph, draw_glyph
from data.toy.names import FIRST, SECOND, draw_names
from data.toy.scenes import Scene, ask, caption, draw_scene
from data.toy.streams import stream

Part = tuple[str, bool] | tuple[int, ...]


@dataclass(slots=True)
class Draft:
    """A page to be drawn. A part is (text, counts in the loss) or the indices of the pictures shown there."""

    parts: list[Part] = field(default_factory=list)
    pictures: list[Scene | Glyph] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def show(self, *pictures: Scene | Glyph) -> None:
        """Add one picture, or the frames of one clip."""
        self.parts.append(tuple(range(len(self.pictures), len(self.pictures) + len(pictures))))
        self.pictures.extend(pictures)

    def say(self, text: str, loss: bool = True) -> None:
        self.parts.append((text, loss))


def scene_pair(rng: np.random.Generator, split: str) -> Draft:
    """A scene and its caption; the label of a held-out one also has a question."""
    del split
    scene = draw_scene(rng)
    draft = Draft()
    draft.show(scene)
    draft.say(caption(scene))
    kind, question, answer = ask(scene, rng)
    draft.meta = {"kind": scene.kind, "caption": caption(scene)}
    draft.meta |= {"question_kind": kind, "question": question, "answer": answer}
    return draft


@cache
def class_name(number: int) -> str:
    """The three-syllable name of a glyph class, for contrastive training; no page calls a glyph by it."""
    parts = FIRST + SECOND
    return "".join(parts[i] for i in stream(0, "class name", number).permutation(len(parts))[:3])


def glyph_pair(rng: np.random.Generator, split: str) -> Draft:
    """A glyph and its class's name, as the contrastive objective reads it."""
    pool = glyphs.classes(split)
    number = pool[int(rng.integers(len(pool)))]
    draft = Draft(meta={"class": number})
    draft.show(draw_glyph(rng, number))
    draft.say(f"the glyph {class_name(number)}")
    return draft


def caption_page(rng: np.random.Generator, split: str, most: int = 3) -> Draft:
    """One to `most` scenes with captions."""
    del split
    draft = Draft()
    for _ in range(int(rng.integers(1, most + 1))):
        scene = draw_scene(rng)
        draft.show(scene)
        draft.say(caption(scene))
    return draft


def question_page(rng: np.random.Generator, split: str, most: int = 3) -> Draft:
    """One to `most` scenes, each with a question, which is not in the loss, and its answer."""
    del split
    draft = Draft()
    for _ in range(int(rng.integers(1, most + 1))):
        scene = draw_scene(rng)
        _, question, answer = ask(scene, rng)
        draft.show(scene)
        draft.say(question, loss=False)
        draft.say(f" {answer}")
    return draft


def binding_page(
    rng: np.random.Generator, split: str, ways: int = 2, shots: int = 4, repeats: float = 0.5
) -> Draft:
    """`ways` glyph classes under made-up names, `shots` examples of each in random order, and one query at the end.

    Every picture after a class's first is, with probability `repeats`, an exact repetition of an earlier one of its
    class: matching equal pictures is learnt first and carries the rest (Singh et al. 2025, arXiv 2501.06256). A name's
    first mention cannot be known and is not in the loss; every later one is, the query's among them.
    """
    pool = glyphs.classes(split)
    numbers = [pool[i] for i in rng.choice(len(pool), size=ways, replace=False)]
    chosen = draw_names(rng, split, ways)
    order = rng.permutation(np.repeat(np.arange(ways), shots))
    order = np.append(order, rng.integers(ways))
    draft = Draft(meta={"classes": numbers, "names": chosen, "answer": chosen[order[-1]], "shots": shots})
    earlier: list[list[int]] = [[] for _ in range(ways)]
    for way in order:
        known = bool(earlier[way])
        if known and rng.random() < repeats:
            again = earlier[way][int(rng.integers(len(earlier[way])))]
            draft.parts.append((again,))
        else:
            earlier[way].append(len(draft.pictures))
            draft.show(draw_glyph(rng, numbers[way]))
        draft.say(f" {chosen[way]}", loss=known)
    return draft


def clip_pair(rng: np.random.Generator, split: str, frames: int = 4) -> Draft:
    """A clip of a moving shape and its caption."""
    del split
    clip, motion = draw_clip(rng, frames)
    draft = Draft(meta={"motion": motion, "caption": clip_caption(clip, motion)})
    draft.show(*clip)
    draft.say(clip_caption(clip, motion))
    return draft


def text_page(rng: np.random.Generator, split: str) -> Draft:
    """A page without pictures, half of them binding pages in words."""
    del split
    kind = ("describe", "ask", "binding", "binding")[int(rng.integers(4))]
    draft = Draft(meta={"kind": kind})
    for text, loss in textpages.draw_text(rng, kind):
        draft.say(text, loss)
    return draft


MAKERS: dict[str, Callable[[np.random.Generator, str], Draft]] = {
    "scene_pairs": scene_pair,
    "glyph_pairs": glyph_pair,
    "captions": caption_page,
    "vqa": question_page,
    "binding": binding_page,
    "clips": clip_pair,
    "text": text_page,
}


def make_draft(seed: int, split: str, kind: str, index: int) -> Draft:
    """Draft `index` of a kind of page in a split ("train" or "heldout")."""
    if split not in ("train", "heldout"):
        raise ValueError(f"a split is train or heldout, not {split!r}")
    return MAKERS[kind](stream(seed, f"{split}/{kind}", index), split)
