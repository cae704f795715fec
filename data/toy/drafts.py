"""Document makers: what a document shows and says, before any image is drawn.

A draft is cheap and a pure function of (seed, split, kind, index); `data.toy.documents` draws many drafts' images at
once. Split "heldout" means images of another stream for every kind, and for binding also names and glyph classes
that no training document has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from data.toy import glyphs, text_documents
from data.toy.clips import clip_caption, draw_clip
from data.toy.glyphs import Glyph, draw_glyph
from data.toy.names import FIRST, SECOND, draw_names, names
from data.toy.scenes import KINDS, Scene, ask, caption, draw_scene
from data.toy.streams import stream

FAMILIAR = 100  # the first so many glyph classes of training have lasting names
Part = tuple[str, bool] | tuple[int, ...]


@dataclass(slots=True)
class Draft:
    """A document to be drawn. A part is (text, counts in the loss) or the indices of the images shown there."""

    parts: list[Part] = field(default_factory=list)
    images: list[Scene | Glyph] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def show(self, *images: Scene | Glyph) -> None:
        """Add one image, or the frames of one clip."""
        self.parts.append(tuple(range(len(self.images), len(self.images) + len(images))))
        self.images.extend(images)

    def say(self, text: str, loss: bool = True) -> None:
        """Add text; `loss` says whether it is learnt."""
        self.parts.append((text, loss))


TRAINING_KINDS = (1 / 6, 1 / 6, 1 / 3, 1 / 3)  # shares of one, count, left and above


def _scene(rng: np.random.Generator, split: str) -> Scene:
    """Return a scene; two of three in training have two shapes, half of those held out.

    What a small model still gets wrong are sizes and colours swapped between two shapes (LOG.md).
    """
    return draw_scene(rng, str(rng.choice(KINDS, p=TRAINING_KINDS)) if split == "train" else None)


def scene_pair(rng: np.random.Generator, split: str) -> Draft:
    """Return a scene and its caption; the label of a held-out one also has a question.

    Half of the training pairs name the shapes alone. With full captions colours and places are enough to tell the texts
    of a batch apart, and the contrastive encoder never learns the shapes of small things.
    """
    scene = _scene(rng, split)
    draft = Draft()
    draft.show(scene)
    draft.say(caption(scene, shapes_only=split == "train" and rng.random() < 0.5))
    kind, question, answer = ask(scene, rng)
    draft.meta = {"kind": scene.kind, "caption": caption(scene)}
    draft.meta |= {"question_kind": kind, "question": question, "answer": answer}
    return draft


@cache
def class_name(number: int) -> str:
    """Return the three-syllable name of a glyph class, for contrastive training; no document calls a glyph by it."""
    parts = FIRST + SECOND
    return "".join(parts[i] for i in stream(0, "class name", number).permutation(len(parts))[:3])


def glyph_pair(rng: np.random.Generator, split: str) -> Draft:
    """Return a glyph and its class's name, as the contrastive objective reads it."""
    pool = glyphs.classes(split)
    number = pool[int(rng.integers(len(pool)))]
    draft = Draft(meta={"class": number})
    draft.show(draw_glyph(rng, number))
    draft.say(f"the glyph {class_name(number)}")
    return draft


def _show_and_say(draft: Draft, rng: np.random.Generator, split: str, asked: bool) -> None:
    """Append a scene with its caption, or with a question (not in the loss) and its answer."""
    scene = _scene(rng, split)
    draft.show(scene)
    if asked:
        _, question, answer = ask(scene, rng)
        draft.say(question, loss=False)
        draft.say(f" {answer}")
    else:
        draft.say(caption(scene))


def caption_document(rng: np.random.Generator, split: str, most: int = 3) -> Draft:
    """Return one to `most` scenes with captions."""
    draft = Draft()
    for _ in range(int(rng.integers(1, most + 1))):
        _show_and_say(draft, rng, split, asked=False)
    return draft


def question_document(rng: np.random.Generator, split: str, most: int = 3) -> Draft:
    """Return one to `most` scenes, each with a question and its answer."""
    draft = Draft()
    for _ in range(int(rng.integers(1, most + 1))):
        _show_and_say(draft, rng, split, asked=True)
    return draft


def _stream_of_names(
    rng: np.random.Generator,
    numbers: Sequence[int],
    chosen: Sequence[str],
    order: np.ndarray,
    repeats: float,
    known: bool,
) -> Draft:
    """Return glyphs of the classes `numbers` in `order`, each followed by its name; see `binding_document`."""
    draft = Draft(meta={"classes": list(numbers), "names": list(chosen), "answer": chosen[order[-1]]})
    earlier: list[list[int]] = [[] for _ in numbers]
    for way in order:
        seen = bool(earlier[way])
        if seen and rng.random() < repeats:
            draft.parts.append((earlier[way][int(rng.integers(len(earlier[way])))],))
        else:
            earlier[way].append(len(draft.images))
            draft.show(draw_glyph(rng, numbers[way]))
        draft.say(f" {chosen[way]}", loss=known or seen)
    return draft


def binding_document(
    rng: np.random.Generator, split: str, ways: int = 2, shots: int = 3, repeats: float = 0.5
) -> Draft:
    """Return ways * shots + 1 glyphs of `ways` classes in a row, each followed by its class's name in this document.

    A training document draws every glyph's class anew: in a balanced order the rarer name could be guessed by counting.
    A held-out document has exactly `shots` examples of each class and one query, whatever `repeats` is no two images
    alike.

    In training every image after a class's first is, with probability `repeats`, an exact repetition of an earlier
    one of its class: matching equal images is learnt first and carries the rest (Singh et al. 2025, arXiv
    2501.06256). A name's first mention cannot be known and is not in the loss; every later one is.
    """
    pool = glyphs.classes(split)
    first = FAMILIAR if split == "train" else 0  # the familiar classes keep their own names
    numbers = [pool[first + int(i)] for i in rng.choice(len(pool) - first, size=ways, replace=False)]
    if split == "train":
        order = rng.integers(ways, size=ways * shots + 1)
    else:
        order = np.append(rng.permutation(np.repeat(np.arange(ways), shots)), rng.integers(ways))
    repeats = repeats if split == "train" else 0.0
    draft = _stream_of_names(rng, numbers, draw_names(rng, split, ways), order, repeats, known=False)
    draft.meta["shots"] = shots
    return draft


@cache
def familiar_name(number: int) -> str:
    """Return the lasting name of a familiar class: a training name, each class another one."""
    return names("train")[number]


def naming_document(rng: np.random.Generator, split: str, ways: int = 2, shots: int = 3, repeats: float = 0.5) -> Draft:
    """Return a binding document of familiar classes under their lasting names, all of which are in the loss.

    Without these documents the images of binding documents stay noise: nothing depends on an image until examples are
    matched, and nothing can be matched until images are told apart. A lasting name gives the direct reason to tell
    them apart, and binding follows within a few hundred steps.
    """
    del split
    while True:
        numbers = [int(i) for i in rng.choice(FAMILIAR, size=ways, replace=False)]
        chosen = [familiar_name(number) for number in numbers]
        if len({name[:2] for name in chosen}) == len({name[2:] for name in chosen}) == ways:
            break
    order = rng.integers(ways, size=ways * shots + 1)
    return _stream_of_names(rng, numbers, chosen, order, repeats, known=True)


def long_document(rng: np.random.Generator, split: str, scenes: int = 9) -> Draft:
    """Return a document as long as a prompt of eight demonstrations: scenes with captions, or scenes with questions.

    A model that has only seen short documents loses its way in long prompts.
    """
    asked = bool(rng.integers(2))
    draft = Draft()
    for _ in range(scenes):
        _show_and_say(draft, rng, split, asked=asked)
    return draft


def long_binding_document(rng: np.random.Generator, split: str) -> Draft:
    """Return a binding document as long as a prompt of eight examples a name."""
    return binding_document(rng, split, shots=8)


def clip_pair(rng: np.random.Generator, split: str, frames: int = 4) -> Draft:
    """Return a clip of a moving shape and its caption."""
    del split
    clip, motion = draw_clip(rng, frames)
    draft = Draft(meta={"motion": motion, "caption": clip_caption(clip, motion)})
    draft.show(*clip)
    draft.say(clip_caption(clip, motion))
    return draft


def _text_draft(kind: str, nodes: Sequence[tuple[str, bool]]) -> Draft:
    draft = Draft(meta={"kind": kind})
    for text, loss in nodes:
        draft.say(text, loss)
    return draft


def text_document(rng: np.random.Generator, split: str) -> Draft:
    """Return a document without images: captions, or captions with questions and answers."""
    del split
    if rng.random() < 0.5:
        return _text_draft("describe", text_documents.describe_text(rng))
    return _text_draft("ask", text_documents.ask_text(rng))


def names_document(rng: np.random.Generator, split: str) -> Draft:
    """Return a document without images that teaches looking back: a repeated line, or a binding document in words."""
    if rng.random() < 1 / 3:
        return _text_draft("repeat", text_documents.repeat_text(rng))
    return _text_draft("binding", text_documents.binding_text(rng, split))


MAKERS: dict[str, Callable[[np.random.Generator, str], Draft]] = {
    "scene_pairs": scene_pair,
    "glyph_pairs": glyph_pair,
    "captions": caption_document,
    "vqa": question_document,
    "long": long_document,
    "naming": naming_document,
    "binding": binding_document,
    "long_binding": long_binding_document,
    "clips": clip_pair,
    "text": text_document,
    "names": names_document,
}


def make_draft(seed: int, split: str, kind: str, index: int) -> Draft:
    """Draft `index` of a kind of document in a split ("train" or "heldout")."""
    if split not in ("train", "heldout"):
        raise ValueError(f"a split is train or heldout, not {split!r}")
    return MAKERS[kind](stream(seed, f"{split}/{kind}", index), split)
