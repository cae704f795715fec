"""Made-up names of two syllables, and which of them are never seen in training.

Fast binding has to work on names that training has not seen. Names held out as whole tokens would test something else,
namely untrained embeddings; here a held-out name is a new combination of syllables that training has seen, in the same
places. The split does not depend on the data's seed: a model trained on one seed may be tested on another.

Thirty-five first and thirty-five second syllables, no syllable in both places: a model learns to copy syllable by
syllable, so each should come often; but the names must be too many to be learnt by heart (with 24 x 24 a small model
learnt them and then failed on the second syllable of every held-out name).
"""

from __future__ import annotations

from functools import cache

import numpy as np

from data.toy.streams import stream

_SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")
FIRST = _SYLLABLES[0::2]
SECOND = _SYLLABLES[1::2]
HELDOUT_SHARE = 0.2

# Words of the toy, or their beginnings: captions must not contain a name, and a name must stay two tokens.
_WORDS = frozenset(
    ["like", "name", "none", "some", "more", "same", "size", "zero", "five", "nine", "digi", "seve", "movi"]
)


@cache
def _shuffled() -> tuple[str, ...]:
    every = [a + b for a in FIRST for b in SECOND if a + b not in _WORDS]
    order = stream(0, "names", 0).permutation(len(every))
    return tuple(every[i] for i in order)


@cache
def names(split: str) -> tuple[str, ...]:
    """Return the names of "train" (four fifths) or "heldout" (one fifth); disjoint."""
    every = _shuffled()
    cut = int(len(every) * HELDOUT_SHARE)
    return every[cut:] if split == "train" else every[:cut]


def draw_names(rng: np.random.Generator, split: str, count: int) -> list[str]:
    """Return `count` names of a split for one document, no two sharing a syllable, so that each is told by its first.

    Raises ValueError for more names than that allows.
    """
    if not 0 <= count <= 12:
        raise ValueError(f"a document has 0 to 12 names, not {count}: names of a document share no syllable")
    pool = names(split)
    chosen: list[str] = []
    used: set[str] = set()
    while len(chosen) < count:
        name = pool[int(rng.integers(len(pool)))]
        if not used & {name[:2], name[2:]}:
            chosen.append(name)
            used |= {name[:2], name[2:]}
    return chosen
