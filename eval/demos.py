"""Which demonstrations a query gets: a pure function of (task hash, seed, query id).

Every draw has its own counter-based generator, keyed by what the draw is for. So a query gets the same demonstrations
whatever the batch size, the order or the limit, on one process or eight; the public harnesses draw from one global
stream, where each of these changes them. Demonstrations are nested: the k-shot prompt shows the last k of the
(k + 1)-shot prompt, so a curve over shots is paired and the pictures of the longest prompt serve all shorter ones.

The leakage guard refuses the query itself and any identical picture (equal SHA-256), under whatever name, and counts
it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.task import Document
from flamingo.errors import UserError


def generator(*purpose: str | int) -> np.random.Generator:
    """The generator of one purpose: equal parts give equal numbers, any difference an independent stream."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in purpose).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def hash_order(ids: Sequence[str], *purpose: str | int) -> list[int]:
    """Indices of `ids` in a shuffled order that depends on each id alone: a further item moves no other two."""
    prefix = "\x1f".join(str(part) for part in purpose).encode()
    keys = [hashlib.sha256(prefix + b"\x1f" + name.encode()).digest() for name in ids]
    return sorted(range(len(ids)), key=lambda index: (keys[index], ids[index]))


@dataclass(frozen=True)
class Demonstrations:
    """Chosen documents, far end first (the last stands next to the query), and how many the guard refused."""

    documents: tuple[Document, ...]
    excluded: int


def leaks(demo: Document, query: Document) -> bool:
    """Whether showing `demo` would show the query: the same item, or an identical picture."""
    if demo.id == query.id:
        return True
    ours, theirs = demo.turn.picture, query.turn.picture
    return ours is not None and theirs is not None and ours.sha256 == theirs.sha256


def _everything(demo: Document, query: Document) -> bool:
    return True


def _same_kind(demo: Document, query: Document) -> bool:
    return demo.kind == query.kind


SAMPLERS: dict[str, Callable[[Document, Document], bool]] = {
    "random": _everything,
    "fixed": _everything,
    "same_kind": _same_kind,
}
"""Name in a task's YAML to the rule saying which documents may be shown. Retrieval will order, not only admit."""


def draw(
    support: Sequence[Document], query: Document, shots: int, *, task_hash: str, seed: int, sampler: str = "random"
) -> Demonstrations:
    """`shots` demonstrations for `query`, nested over `shots`.

    Raises:
        UserError: the support set has too few documents that may be shown.
    """
    if shots == 0:
        return Demonstrations((), 0)
    admits = SAMPLERS[sampler]
    whose = "" if sampler == "fixed" else query.id
    chosen: list[Document] = []
    excluded = 0
    for index in generator("demos", task_hash, seed, whose).permutation(len(support)):
        candidate = support[int(index)]
        if leaks(candidate, query):
            excluded += 1
        elif admits(candidate, query):
            chosen.append(candidate)
        if len(chosen) == shots:
            return Demonstrations(tuple(reversed(chosen)), excluded)
    raise UserError(
        f"query {query.id} asks for {shots} demonstrations (demos={sampler}) and the support set of {len(support)} "
        f"has {len(chosen)} for it; use fewer shots or a larger support set"
    )
