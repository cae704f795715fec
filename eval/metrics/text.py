"""Scores of one answer against its gold answers, and how a raw completion becomes an answer.

A completion is cut at the first newline and trimmed, nothing else: an answer that then differs is wrong. What cannot be
parsed is wrong and counted; no score here ever guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eval.metrics.vqa import vqa_accuracy


def parse_answer(raw: str) -> str:
    """The answer in a completion: its first non-empty line, white space collapsed; "" when there is none."""
    lines = [" ".join(line.split()) for line in raw.splitlines()]
    return next((line for line in lines if line), "")


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1.0 if `answer` equals one of `golds` but for white space, else 0.0. Letter case and punctuation count."""
    return float(bool(answer) and answer in [" ".join(gold.split()) for gold in golds])


SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
}
"""Name in a task's YAML to score; a new score is an entry here."""
