"""Scores of one answer against its gold answers, and how a raw completion becomes an answer.

A completion is cut at the first newline and trimmed, nothing else: an answer that then differs is wrong. What cannot be
parsed is wrong and counted; no score here ever guesses.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

from eval.metrics.captions import Cider, rouge_l
from eval.metrics.medical import token_f1
from eval.metrics.vqa import vqa_accuracy, vqa_accuracy_by_value
from eval.metrics.wordnet import wordnet
from eval.metrics.wups import wups_score
from eval.task import parse_answer


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """Return 1.0 if `answer` equals one of `golds` but for white space, else 0.0. Letter case and punctuation count."""
    return float(bool(answer) and answer in [" ".join(gold.split()) for gold in golds])


def answered(answer: str, golds: Sequence[str]) -> float:
    """Return 1.0 if there is an answer at all: for questions without a gold answer, which people have to rate."""
    return float(bool(answer.strip()))


def folded_match(answer: str, golds: Sequence[str]) -> float:
    """Return 1.0 if `answer` equals one of `golds` but for letter case, white space and a full stop at the end."""
    return float(bool(_folded(answer)) and _folded(answer) in [_folded(gold) for gold in golds])


def _folded(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").strip()


def words_match(answer: str, golds: Sequence[str]) -> float:
    """Return 1.0 if `answer` equals one of `golds` but for letter case, white space and ASCII punctuation (SMMILE)."""
    return float(bool(_words(answer)) and _words(answer) in [_words(gold) for gold in golds])


def _words(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def ivqa_accuracy(answer: str, golds: Sequence[str]) -> float:
    """Return iVQA's accuracy: the share of two annotators who gave the answer, 1 at most (Yang et al. 2021)."""
    return min(1.0, sum(_folded(gold) == _folded(answer) for gold in golds) / 2)


def open_match(answer: str, golds: Sequence[str]) -> float:
    """Return 1.0 by MMMU's rule for open answers: the answer has a gold number (to two decimals) or a gold text."""
    lower = answer.lower()
    numbers = {round(float(number.replace(",", "")), 2) for number in _NUMBER.findall(lower)}
    for gold in golds:
        text = " ".join(gold.lower().split())
        if _NUMBER.fullmatch(text):
            if round(float(text.replace(",", "")), 2) in numbers:
                return 1.0
        elif text and text in " ".join(lower.split()):
            return 1.0
    return 0.0


def first_number(answer: str, golds: Sequence[str]) -> float:
    """Return 1.0 if the first digits of the answer are a gold answer: VL-ICL's rule, by which no sign is ever read."""
    found = re.search(r"\d+", answer)
    return float(found is not None and found[0] in golds)


def says_yes(answer: str, golds: Sequence[str]) -> float:
    """Return 1.0 if "yes" being somewhere in the answer is right: VL-ICL's rule, by which anything else is a no."""
    return float(("yes" in answer.lower()) == (golds[0].lower() == "yes"))


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
Score = Callable[[str, Sequence[str]], float]
SCORES: dict[str, Score] = {
    "exact_match": exact_match,
    "accuracy": folded_match,
    "words_match": words_match,
    "vqa_accuracy": vqa_accuracy,
    "vqa_accuracy_by_value": vqa_accuracy_by_value,
    "ivqa": ivqa_accuracy,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "wups": wups_score,
    "open_match": open_match,
    "answered": answered,
    "first_number": first_number,
    "says_yes": says_yes,
}
"""Name in a task's YAML to score; a new score is an entry here."""
OF_SET: dict[str, Callable[[Sequence[Sequence[str]]], Score]] = {"cider": lambda golds: Cider(golds).score}
"""Scores that depend on the gold answers of all queries."""
SCORE_NAMES = (*SCORES, *OF_SET)


def scorer(name: str, golds: Sequence[Sequence[str]]) -> Score:
    """Return the score of that name for a task whose queries have these gold answers.

    Raises:
        UserError: what the score needs is not on this machine; raised before the model runs, not after.
    """
    if name == "wups":
        wordnet()
    return OF_SET[name](golds) if name in OF_SET else SCORES[name]


def clean(raw: str, *, tail: str = "", cut: Sequence[str] = (), remove: str = "") -> str:
    """Return the first line of `raw`, up to the first of the strings in `cut`, without the characters of `remove`.

    `tail` is the fixed end of an answer.
    """
    answer = parse_answer(raw)
    for mark in cut:
        answer = answer.split(mark, 1)[0]
    answer = " ".join("".join(letter for letter in answer if letter not in remove).split())
    return " ".join(answer.removesuffix(tail).split()) if tail else answer
