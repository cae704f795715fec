"""From a completion to an answer: cut, trimmed, nothing guessed."""

from __future__ import annotations

from collections.abc import Sequence

from eval.metrics.text import parse_answer


def clean(raw: str, *, tail: str = "", cut: Sequence[str] = (), remove: str = "") -> str:
    """The first line of `raw`, up to the first of the strings in `cut`, without the characters of `remove`.

    `tail` is the fixed end of an answer.
    """
    answer = parse_answer(raw)
    for mark in cut:
        answer = answer.split(mark, 1)[0]
    answer = " ".join("".join(letter for letter in answer if letter not in remove).split())
    return " ".join(answer.removesuffix(tail).split()) if tail else answer
