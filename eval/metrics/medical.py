"""Scores of medical question answering: those of the published scorer, and the same with its faults mended.

The published scorer (LLaVA-Med 1.0) is what the tables of VQA-RAD, SLAKE and PathVQA were made with. What is notable:

- An open answer's "recall" counts a hit as often as the *prediction* repeats it, so repeats inflate it, and it grows
  with every further word: a constant answer of the 500 commonest words scores above 90.
- A closed answer is right if it contains "yes" or "no" anywhere ("no" in "normal") and contains the gold string; a
  gold that is neither ("left") can hardly be right, and the constant "yes no" is nearly always right.

So the mended versions stand beside them: recall and F1 over bags of words with each hit counted once, exact match, and
closed accuracy by whole words, where an answer that says both yes and no is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from eval.metrics.vqa import normalise

OPPOSITE = {"yes": "no", "no": "yes"}


def medical_words(text: str) -> list[str]:
    """Words as the published scorer has them: VQA's normalisation, and no commas left."""
    return normalise(text).replace(",", "").split()


def published_open(answer: str, gold: str) -> tuple[float, float, float]:
    """(recall, precision, F1) as published: hits have the prediction's multiplicity, misses the gold's."""
    said, truth = Counter(medical_words(answer)), Counter(medical_words(gold))
    hits = sum(count for word, count in said.items() if word in truth)
    if not hits:
        return 0.0, 0.0, 0.0
    missed = sum(count for word, count in truth.items() if word not in said)
    recall, precision = hits / (hits + missed), hits / said.total()
    return recall, precision, 2 * precision * recall / (precision + recall)


def published_closed(answer: str, gold: str) -> float:
    """By substrings, as published (with the branch for answers without yes or no, which one script lacked)."""
    said, truth = " ".join(medical_words(answer)), " ".join(medical_words(gold))
    return float(("yes" in said or "no" in said) and truth in said)


def open_scores(answer: str, gold: str) -> tuple[float, float, float]:
    """(recall, precision, F1) of bags of words: a word counts as often as both have it."""
    said, truth = Counter(medical_words(answer)), Counter(medical_words(gold))
    hits = (said & truth).total()
    if not hits:
        return 0.0, 0.0, 0.0
    recall, precision = hits / truth.total(), hits / said.total()
    return recall, precision, 2 * precision * recall / (precision + recall)


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """The best F1 over the accepted answers; for an answer of one word it is exact match."""
    return max((open_scores(answer, gold)[2] for gold in golds), default=0.0)


def closed(answer: str, gold: str) -> float:
    """Whether the gold words are in the answer as words in this order, and, for yes and no, the opposite is not."""
    said, truth = medical_words(answer), medical_words(gold)
    if not truth or (len(truth) == 1 and OPPOSITE.get(truth[0]) in said):
        return 0.0
    return float(any(said[start : start + len(truth)] == truth for start in range(len(said) - len(truth) + 1)))


def medical_exact(answer: str, gold: str) -> float:
    """Whether the words are the same ones."""
    return float(bool(medical_words(answer)) and medical_words(answer) == medical_words(gold))


def is_closed(kind: str) -> bool:
    """Data sets write CLOSED, "CLOSED " and closed."""
    return kind.strip().lower() in ("closed", "yes/no")
