"""Made-up names of two syllables, and which of them are never seen in training.

Fast binding has to work on names that training has not seen. Names held out as whole tokens would test something else,
namely untrained embeddings; here a held-out name is a new combination of syllables that training has seen, in the same
places. The split does not depend on the data's seed: a model trained on one seed may be tested on another.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from data.toy.streams import stream

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
HELDOUT_SHARE = 0.2

# English words or their beginnings: captions must not contain a name, and a name must stay two tokens.
_WORDS = frozenset({"like", "name", "one", "none", "some", "more", "same", "size", "zero", "five", "nine", "digi", "seve", "movi"})


def syllables() -> list[str]:
    """All syllables, a consonant and a vowel each (70)."""
    return [c + v for c in CONSONANTS for v in VOWELS]


@cache
def _shuffled() -> tuple[str, ...]:
    parts = syllables()
    # "bobo" is left out: a name's two syllables differ, so that copying a name is two separate steps.
    every = [a + b for a in parts for b in parts if a != b and a + b not in _WORDS]
    order = stream(0, "names", 0).permutation(len(every))
    return tuple(every[i] for i in order)


@cache
def names(split: str) -> tuple[str, ...]:
    """The names of "train" (80 % of 4,830) or "heldout" (the others); disjoint."""
    every = _shuffled()
    cut = int(len(every) * HELDOUT_SHARE)
    return every[cut:] if split == "train" else every[:cut]


def draw_names(rng: np.random.Generator, split: str, count: int) -> list[str]:
    """`count` names of a split for one page, no two sharing a syllable, so that each is told by its first."""
    pool = names(split)
    chosen: list[str] = []
    while len(chosen) < count:
        name = pool[int(rng.integers(len(pool)))]
        used = {part for other in chosen for part in (other[:2], other[2:])}
        if name[:2] not in used and name[2:] not in used:
            chosen.append(name)
    return chosen
