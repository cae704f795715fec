"""WUPS: answers compared word by word in WordNet's hierarchy (Malinowski and Fritz 2014), as NExT-QA scores with it.

For every word the most similar word of the other side (Wu and Palmer's similarity of the first synsets; one below the
threshold counts a tenth), multiplied over the words that have any; the lesser of both directions. In the published
script, words without any similarity are skipped instead of counting as 0, and yes/no and counting questions (DB, DC)
are scored by equality.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from eval.metrics.wordnet import WordNet, wordnet

Similarity = Callable[[str, str], float]
_STOP_WORDS = (
    "a about again ain all am an and any are aren aren't as at be because been being but can couldn couldn't d did "
    "didn didn't do does doesn doesn't doing don don't during each for from further had hadn hadn't has hasn hasn't "
    "have haven haven't having he her here hers herself him himself his how i if into is isn isn't it it's its itself "
    "just ll m ma me mightn mightn't most mustn mustn't my myself needn needn't now o of only or other our ours "
    "ourselves own re s shan shan't she she's should should've shouldn shouldn't so some such t than that that'll the "
    "their theirs them themselves then there these they this those through to too until ve very was wasn wasn't we "
    "were weren weren't what when where which while who whom why will with won won't wouldn wouldn't y you you'd "
    "you'll you're you've your yours yourself yourselves"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Left out on both sides: the function words that NExT-QA's scorer leaves out; no, not, before, after, up stay."""
BY_EQUALITY = ("DB", "DC")


def wups(answer: Sequence[str], gold: Sequence[str], similarity: Similarity, threshold: float = 0.0) -> float:
    """Return WUPS of two lists of words."""
    return min(_one_way(answer, gold, similarity, threshold), _one_way(gold, answer, similarity, threshold))


def _one_way(words: Sequence[str], others: Sequence[str], similarity: Similarity, threshold: float) -> float:
    best = [max((_damped(word, other, similarity, threshold) for other in others), default=0.0) for word in words]
    similar = [value for value in best if value > 0]  # as published: a word without any similarity is skipped
    return math.prod(similar) if similar else 0.0


def _damped(word: str, other: str, similarity: Similarity, threshold: float) -> float:
    if word == other:
        return 1.0
    near = similarity(word, other)
    return near if near >= threshold else 0.1 * near


def lemmatised(text: str, net: WordNet) -> list[str]:
    """Return lower-case lemmas, as a noun where there is such a noun and else as a verb, without stop words."""
    words = [word for word in re.findall(r"[a-z0-9']+", text.lower()) if word not in STOP_WORDS]
    lemmas = [next(iter([*net.lemmas(word, "n"), *net.lemmas(word, "v")]), word) for word in words]
    return [word for word in lemmas if word not in STOP_WORDS]


def wups_score(answer: str, golds: Sequence[str], threshold: float = 0.0, equality: bool = False) -> float:
    """Return the best over the gold answers. With `equality` the lemmas must be the same."""
    net = wordnet()
    words = lemmatised(answer, net)
    truths = [lemmatised(gold, net) for gold in golds]
    if equality:
        return float(words in truths)
    return max((wups(words, truth, net.similarity, threshold) for truth in truths), default=0.0)
