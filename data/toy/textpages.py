"""Pages of text alone, from which the language model learns the toy's language and to learn in context.

A frozen language model can only bind a name to a picture if it already binds names to descriptions: `binding_text` is
the binding page with a description where a picture would stand. Descriptions of one class are not equal, they share
most of their words in any order, so that the model learns to match by likeness and not by exact repetition only.
"""

from __future__ import annotations

import numpy as np

from data.toy.names import FIRST, SECOND, draw_names
from data.toy.scenes import COLOURS, SHAPES, ask, caption, draw_scene

KINDS = ("describe", "ask", "binding")


def describe_text(rng: np.random.Generator, count: int = 4) -> list[tuple[str, bool]]:
    """Captions, one a line. Returns (text, counts in the loss) nodes, as all makers here do."""
    return [("\n".join(caption(draw_scene(rng)) for _ in range(count)), True)]


def ask_text(rng: np.random.Generator, count: int = 3) -> list[tuple[str, bool]]:
    """A caption, a question about it and the answer, `count` times."""
    nodes: list[tuple[str, bool]] = []
    for i in range(count):
        scene = draw_scene(rng)
        _, question, answer = ask(scene, rng)
        nodes += [(f"{chr(10) if i else ''}{caption(scene)}\n{question}", False), (f" {answer}", True)]
    return nodes


def _vocabulary() -> list[str]:
    return [*FIRST, *SECOND, *SHAPES, *COLOURS]


def binding_text(
    rng: np.random.Generator, split: str = "train", ways: int = 2, shots: int = 4, words: int = 3
) -> list[tuple[str, bool]]:
    """`ways` x `shots` descriptions with names and one more, in random order.

    A class is a set of random words; a description shows 1 to `words` of them. Only names that the page has shown
    before count in the loss: the first one cannot be known.
    """
    pool = _vocabulary()
    chosen = draw_names(rng, split, ways)
    picks = rng.permutation(len(pool))[: ways * words].reshape(ways, words)
    order = rng.permutation(np.repeat(np.arange(ways), shots))
    order = np.append(order, rng.integers(ways))
    seen: set[int] = set()
    nodes: list[tuple[str, bool]] = []
    size = int(rng.integers(1, words + 1))
    for row, way in enumerate(order):
        shown = rng.permutation(picks[way])[: max(size, 1)] if size > 1 else picks[way][:1]
        description = " ".join(pool[i] for i in shown)
        nodes.append((f"{chr(10) if row else ''}{description}", False))
        nodes.append((f" {chosen[way]}", int(way) in seen))
        seen.add(int(way))
    return nodes


def draw_text(rng: np.random.Generator, kind: str) -> list[tuple[str, bool]]:
    """A text page of a kind, training names only."""
    if kind == "describe":
        return describe_text(rng)
    if kind == "ask":
        return ask_text(rng)
    if kind == "binding":
        return binding_text(rng)
    raise ValueError(f"a text page is one of {', '.join(KINDS)}, not {kind!r}")
