"""Scores of medical question answering: those of the published scorer, and the same with its faults corrected.

The published scorer (LLaVA-Med 1.0) is what the tables of VQA-RAD, SLAKE and PathVQA were made with. It has two faults:

- An open answer's "recall" counts a hit as often as the *prediction* repeats it, so repeats inflate it, and it grows
  with every further word: a constant answer of the 500 commonest words scores above 90.
- A closed answer is right if it contains "yes" or "no" anywhere ("no" in "normal") and contains the gold string; a
  gold that is neither ("left") can hardly be right, and the constant "yes no" is nearly always right.

So corrected versions are reported as well: recall and F1 over bags of words with each hit counted once, exact match,
and closed accuracy by whole words, where an answer with both yes and no is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from eval.metrics.vqa import normalise

OPPOSITE = {"yes": "no", "no": "yes"}


def medical_words(text: str) -> list[str]:
    """Return words as the published scorer has them: VQA's normalisation, and no commas left."""
    return normalise(text).replace(",", "").split()


def published_open(answer: str, gold: str) -> tuple[float, float, float]:
    """Return (recall, precision, F1) as published: hits have the prediction's multiplicity, misses the gold's."""
    words, gold_words = Counter(medical_words(answer)), Counter(medical_words(gold))
    hits = sum(count for word, count in words.items() if word in gold_words)
    if not hits:
        return 0.0, 0.0, 0.0
    missed = sum(count for word, count in gold_words.items() if word not in words)
    recall, precision = hits / (hits + missed), hits / words.total()
    return recall, precision, 2 * precision * recall / (precision + recall)


def published_closed(answer: str, gold: str) -> float:
    """Score by substrings, as published (with the branch for answers without yes or no, which one script lacked)."""
    words, gold_words = " ".join(medical_words(answer)), " ".join(medical_words(gold))
    return float(("yes" in words or "no" in words) and gold_words in words)


def open_scores(answer: str, gold: str) -> tuple[float, float, float]:
    """Return (recall, precision, F1) of bags of words: a word counts as often as both have it."""
    words, gold_words = Counter(medical_words(answer)), Counter(medical_words(gold))
    hits = (words & gold_words).total()
    if not hits:
        return 0.0, 0.0, 0.0
    recall, precision = hits / gold_words.total(), hits / words.total()
    return recall, precision, 2 * precision * recall / (precision + recall)


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """Return the best F1 over the accepted answers; for an answer of one word it is exact match."""
    return max((open_scores(answer, gold)[2] for gold in golds), default=0.0)


def closed(answer: str, gold: str) -> float:
    """Return 1.0 if the answer has the gold words in this order and, for yes and no, not the opposite."""
    words, gold_words = medical_words(answer), medical_words(gold)
    if not gold_words or (len(gold_words) == 1 and OPPOSITE.get(gold_words[0]) in words):
        return 0.0
    return float(
        any(words[start : start + len(gold_words)] == gold_words for start in range(len(words) - len(gold_words) + 1))
    )


def medical_exact(answer: str, gold: str) -> float:
    """Return whether the words are the same."""
    return float(bool(medical_words(answer)) and medical_words(answer) == medical_words(gold))


def is_closed(kind: str) -> bool:
    """Return whether a kind is closed; data sets write CLOSED, "CLOSED " and closed."""
    return kind.strip().lower() in ("closed", "yes/no")
