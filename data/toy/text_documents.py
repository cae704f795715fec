"""Documents of text alone, from which the language model learns the toy's language and to learn in context.

A language model can only bind a name to an image if it can look back for what followed the same thing before:
`repeat_text` and `binding_text` (a binding document with a word where an image would stand) teach it that.
"""

from __future__ import annotations

import numpy as np

from data.toy.names import FIRST, SECOND, draw_names
from data.toy.scenes import COLOURS, SHAPES, ask, caption, draw_scene


def describe_text(rng: np.random.Generator, count: int = 4) -> list[tuple[str, bool]]:
    """Return captions, one a line, as (text, in the loss) nodes, like all makers here."""
    return [("\n".join(caption(draw_scene(rng)) for _ in range(count)), True)]


def ask_text(rng: np.random.Generator, count: int = 3) -> list[tuple[str, bool]]:
    """Return a caption, a question about it and the answer, `count` times."""
    nodes: list[tuple[str, bool]] = []
    for i in range(count):
        scene = draw_scene(rng)
        _, question, answer = ask(scene, rng)
        nodes += [(f"{chr(10) if i else ''}{caption(scene)}\n{question}", False), (f" {answer}", True)]
    return nodes


def _vocabulary() -> list[str]:
    return [*FIRST, *SECOND, *SHAPES, *COLOURS]


def repeat_text(rng: np.random.Generator, least: int = 4, most: int = 16) -> list[tuple[str, bool]]:
    """Return `least` to `most` random words on a line, and the same line again, to be predicted by looking back."""
    pool = _vocabulary()
    line = " ".join(pool[i] for i in rng.permutation(len(pool))[: int(rng.integers(least, most + 1))])
    return [(f"{line}\n{line}", True)]


def binding_text(
    rng: np.random.Generator, split: str = "train", ways: int = 6, lines: int = 10
) -> list[tuple[str, bool]]:
    """Return `lines` lines, each a random word and the name that it has in this document; 2 to `ways` words, shuffled.

    Only names that the document has shown before count in the loss: a first one cannot be known. Two words alone teach
    too little (either name is right half of the time), hence up to `ways`.
    """
    pool = _vocabulary()
    count = int(rng.integers(2, ways + 1))
    chosen = draw_names(rng, split, count)
    picks = rng.permutation(len(pool))[:count]
    seen: set[int] = set()
    nodes: list[tuple[str, bool]] = []
    for line, way in enumerate(rng.integers(count, size=lines).tolist()):
        newline = "\n" if line else ""
        nodes.append((f"{newline}{pool[picks[way]]}", False))
        nodes.append((f" {chosen[way]}", way in seen))
        seen.add(way)
    return nodes
