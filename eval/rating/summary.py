"""What filled sheets say: shares of each option, agreement of the raters, and which of two systems is better.

Shares are over ratings; their intervals resample questions (those of one image together) and raters, both with
replacement, so they are about other questions and other raters of the same kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from eval.metrics.interval import Interval, mean_interval
from eval.rating.agreement import alpha, alpha_interval
from eval.rating.filled import Filled, Rating
from eval.rating.plan import Plan
from eval.reports.compare import sign_flip

Row = dict[str, Any]


def summary_of(filled: Filled, plan: Plan) -> dict[str, Any]:
    """Return the content of `ratings.json`."""
    by_axis: dict[str, list[Rating]] = {key: [] for key in plan.axes}
    for rating in filled.ratings:
        by_axis[rating.axis].append(rating)
    rated = {key: ratings for key, ratings in by_axis.items() if ratings}
    return {
        "sheet": plan.sheet,
        "systems": plan.systems,
        "raters": {rater: {"rated": done, "asked": asked} for rater, (done, asked) in filled.done.items()},
        "repeated": filled.repeated,
        "questions": len({rating.question for rating in filled.ratings}),
        "shares": [row for key, ratings in rated.items() for row in shares(key, ratings, plan)],
        "agreement": [agreement(key, ratings, plan) for key, ratings in rated.items()],
        "wins": [wins(key, rated[key], plan) for key in rated if len(plan.systems) == 2 and _compares(key, plan)],
        "notes": _notes(filled, by_axis),
    }


def _compares(key: str, plan: Plan) -> bool:
    return plan.axes[key].compares or plan.axes[key].ordered


def _notes(filled: Filled, by_axis: dict[str, list[Rating]]) -> list[str]:
    """Say what is missing, in sentences."""
    notes = [f"{rater} has rated {done} of {asked}" for rater, (done, asked) in filled.done.items() if done < asked]
    notes += [f"nobody has rated {key}" for key, ratings in by_axis.items() if not ratings]
    if filled.repeated:
        notes.append(f"{filled.repeated} ratings were handed in more than once, each time the same; they count once")
    return notes


def shares(key: str, ratings: Sequence[Rating], plan: Plan) -> list[Row]:
    """Return a row for each system and option; for a comparison, whose rows are those of `wins`, none."""
    if plan.axes[key].compares:
        return []
    rows = []
    for system, name in enumerate(plan.systems):
        own = [rating for rating in ratings if rating.system == system]
        for value, option in enumerate(plan.axes[key].choices if own else ()):
            chosen = [float(rating.value == value) for rating in own]
            interval = _interval(chosen, own, plan)
            rows.append({"axis": key, "system": name, "option": option, **_share(chosen, interval)})
    return rows


def _share(values: Sequence[float], interval: Interval) -> Row:
    facts = {"interval": interval.ends, "method": interval.method, "note": interval.note}
    return {"share": float(np.mean(values)), "n": len(values), **facts}


def _interval(values: Sequence[float], ratings: Sequence[Rating], plan: Plan) -> Interval:
    raters = {rater: number for number, rater in enumerate(plan.sheets)}
    clusters = [plan.questions[rating.question].cluster for rating in ratings]
    interval = mean_interval(values, clusters, [raters[rating.rater] for rating in ratings])
    return replace(interval, note=interval.note.replace("image", "question"))  # intervals speak of images


def agreement(key: str, ratings: Sequence[Rating], plan: Plan) -> Row:
    """Return Krippendorff's alpha of an axis; its units are the answers, or the questions where two are compared."""
    axis = plan.axes[key]
    units: dict[tuple[str, int | None], list[int]] = defaultdict(list)
    for rating in ratings:
        units[rating.question, rating.system].append(rating.value)
    counts = np.array([np.bincount(values, minlength=len(axis.choices)) for values in units.values()])
    ordered = axis.ordered or axis.compares
    value = float(alpha(counts, ordered)[0])
    twice = int((counts.sum(1) > 1).sum())
    row: Row = {"axis": key, "level": "ordinal" if ordered else "nominal", "units": twice, "alpha": None}
    if np.isnan(value):
        why = "all ratings are the same" if twice else "nothing is rated by two raters: choose a larger overlap"
        return {**row, "interval": [None, None], "note": f"no alpha: {why}"}
    interval = alpha_interval(counts, ordered, [plan.questions[question].cluster for question, _ in units])
    return {**row, "alpha": value, "interval": interval.ends, "note": interval.note.replace("image", "question")}


def wins(key: str, ratings: Sequence[Rating], plan: Plan) -> Row:
    """Return how often each system is better, by the raters' choice, or by one rater's ratings of both answers."""
    compared = [rating for rating in ratings if rating.system is None]
    outcomes = [rating.value - 1 for rating in compared]  # -1: the first is better
    if not plan.axes[key].compares:
        pairs: dict[tuple[str, str], dict[int, Rating]] = defaultdict(dict)
        for rating in ratings:
            pairs[rating.rater, rating.question][rating.system or 0] = rating
        both = [pair for pair in pairs.values() if len(pair) == 2]
        compared = [pair[0] for pair in both]
        outcomes = [int(np.sign(pair[0].value - pair[1].value)) for pair in both]  # the lower option is the better
    row: Row = {"axis": key, "first": plan.systems[0], "second": plan.systems[1], "n": len(outcomes)}
    for name, outcome in (("first_wins", -1), ("ties", 0), ("second_wins", 1)):
        hits = [float(found == outcome) for found in outcomes]
        row[name] = _share(hits, _interval(hits, compared, plan)) if hits else None
    clusters = [plan.questions[rating.question].cluster for rating in compared]
    row["p"] = sign_flip(np.array(outcomes, dtype=np.float64), clusters) if outcomes else None
    return row
