"""Who rates what, in which order and on which side: a pure function of the answers, the axes and the seed.

The plan without questions and answers is `key.json`, which says what the sheets hide: which system gave which answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.records import read_json
from eval.rating.axes import Axis, axes_of, plain
from eval.reports.answers import Pairs, text_of
from eval.reports.gallery import figures_of
from eval.task import content_hash, hash_order
from flamingo.errors import UserError
from flamingo.files import write_atomically

KEY = "key.json"
FORMAT = 1


@dataclass(frozen=True)
class Question:
    """What a rater sees: the query's images (SHA-256), each with the text after it, and an answer of each system."""

    figures: tuple[tuple[str | None, str], ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What the key knows of a question; ratings of the same `cluster` (the image) are not independent."""

    task: str
    query_id: str
    kind: str
    cluster: str


@dataclass(frozen=True)
class Plan:
    """`sheets` have, for each rater, (question, the system on each side) in the order of rating."""

    sheet: str  # names the plan: other answers, axes or seeds give another one
    systems: list[str]
    axes: dict[str, Axis]
    questions: dict[str, Facts]
    sheets: dict[str, list[tuple[str, tuple[int, ...]]]]


@dataclass(frozen=True)
class Shares:
    """How the work is shared: `overlap` is the share of the questions that every rater gets."""

    raters: int
    overlap: float
    seed: int
    most: int | None = None  # questions


def make_plan(
    systems: Sequence[str], pairs: Pairs, axes: Mapping[str, Axis], shares: Shares
) -> tuple[Plan, dict[str, Question]]:
    """Return the plan, and what its questions show. Raises UserError when a rater would have nothing to do."""
    # With a letter before it no spreadsheet takes a name for a number.
    named = {f"q{content_hash(shares.seed, *key)[:16]}": key for key in pairs}
    names = sorted(named)  # a hash of the seed: a shuffled order that says nothing of the data
    names = names[: shares.most]
    facts, shown = {}, {}
    for name in names:
        samples = pairs[named[name]]
        first = samples[0]
        figures = tuple((sha256, text) for sha256, text, is_query in figures_of(first) if is_query)
        facts[name] = Facts(first.cell.task, first.query_id, first.kind, first.cluster)
        shown[name] = Question(figures, tuple(text_of(sample) for sample in samples))
    common = round(shares.overlap * len(names))
    raters = [f"R{number + 1}" for number in range(shares.raters)]
    sheets = {}
    for number, rater in enumerate(raters):
        own = names[:common] + names[common + number :: shares.raters]
        if not own:
            raise UserError(
                f"{len(names)} questions are too few for raters={shares.raters} with overlap={shares.overlap:g}: "
                f"{rater} would have none"
            )
        sheets[rater] = _sheet(own, len(systems), rater, shares.seed)
    body = (list(systems), plain(dict(axes)), asdict(shares), facts, shown)
    return Plan(f"s{content_hash(*body)[:16]}", list(systems), dict(axes), facts, sheets), shown


def _sheet(names: Sequence[str], systems: int, rater: str, seed: int) -> list[tuple[str, tuple[int, ...]]]:
    """Return a rater's questions in their order; of two systems each is on the left half of the time."""
    order = hash_order(names, "order", seed, rater)
    turned = set(hash_order(names, "sides", seed, rater)[: len(names) // 2])
    straight = tuple(range(systems))
    return [(names[k], straight[::-1] if k in turned else straight) for k in order]


def write_key(plan: Plan, path: Path) -> None:
    """Write the key, whole or not at all."""
    body = {"format": FORMAT, **asdict(plan), "axes": plain(plan.axes)}
    write_atomically(path, json.dumps(body, indent=1, ensure_ascii=False) + "\n")


def read_key(path: Path) -> Plan:
    """Return the plan that `write_key` wrote. Raises UserError for any other file."""
    body: Any = read_json(path)
    try:
        if body["format"] != FORMAT:
            raise UserError(f"{path} has format {body['format']}, this version reads {FORMAT}; make the sheets again")
        questions = {name: Facts(**facts) for name, facts in body["questions"].items()}
        sheets = {
            rater: [(name, tuple(int(side) for side in sides)) for name, sides in entries]
            for rater, entries in body["sheets"].items()
        }
        plan = Plan(body["sheet"], list(body["systems"]), axes_of(body["axes"], str(path)), questions, sheets)
        for name, sides in (item for sheet in sheets.values() for item in sheet):
            if name not in questions or sorted(sides) != list(range(len(plan.systems))):
                raise ValueError(f"question {name} is not whole")
        return plan
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not the key of rating sheets ({type(error).__name__}: {error})") from None
