"""What a judge's scores say: relative scores, wins, and whether the judge looks at the place instead of the answer.

The relative score is LLaVA-Med's: the mean over judgements of the second system's score divided by the first's. Both
orders count, and a question without scores in both is left out and counted. A win needs both orders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from eval.judging.judge import Judged
from eval.metrics.interval import cluster_bootstrap, mean_interval
from eval.reports.compare import sign_flip
from eval.reports.results import interval_text, percent
from eval.reports.tables_page import Table

Row = dict[str, Any]
SIGNIFICANT = 0.05


def summary_of(judged: Sequence[Judged], systems: Sequence[str]) -> Row:
    """Return the content of `judge.json`."""
    whole = [one for one in judged if None not in one.scores]
    groups: dict[str, list[Judged]] = {"overall": whole}
    for one in whole:
        groups.setdefault(f"{one.task}: {one.kind or '(no kind)'}", []).append(one)
    bias = position_bias(whole)
    lost = Counter(one.why for one in judged if None in one.scores)
    notes = [f"{count} of {len(judged)} questions are left out: {why}" for why, count in lost.most_common()]
    if bias["p"] < SIGNIFICANT:
        place = "first" if bias["points"] > 0 else "second"
        points = f"{bias['points']:+.2f} points for the answer shown first, p = {bias['p']:.4f}"
        notes.insert(0, f"the judge is biased towards the {place} place ({points}); means of both orders allow for it")
    return {
        "systems": list(systems),
        "questions": len(whole),
        "left_out": dict(lost),
        "relative": [{"group": name, **relative(own)} for name, own in groups.items()],
        "wins": [{"group": name, **wins(own)} for name, own in groups.items()],
        "position": bias,
        "notes": notes,
    }


def _pairs(judged: Sequence[Judged]) -> np.ndarray:
    """Return the scores (questions, orders, systems)."""
    return np.array([one.scores for one in judged], dtype=np.float64)


def relative(judged: Sequence[Judged]) -> Row:
    """Return mean scores, and the mean ratio with its interval over questions, of both orders and of each."""
    scores = _pairs(judged)
    ratios = scores[:, :, 1] / scores[:, :, 0]
    interval = cluster_bootstrap(ratios.mean(1).tolist(), [one.cluster for one in judged])
    return {
        "n": len(judged),
        "scores": scores.mean((0, 1)).tolist(),
        "relative": float(ratios.mean()),
        "interval": interval.ends,
        "by_order": ratios.mean(0).tolist(),
        "note": interval.note.replace("image", "question"),
    }


def wins(judged: Sequence[Judged]) -> Row:
    """Return the shares of questions that each system wins in both orders; all others are ties."""
    scores = _pairs(judged)
    better = np.sign(scores[:, :, 1] - scores[:, :, 0])  # 1: the second system
    clusters = [one.cluster for one in judged]
    row: Row = {"n": len(judged), "same_in_both_orders": float((better[:, 0] == better[:, 1]).mean())}
    tests: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "first": lambda signs: (signs == -1).all(1),
        "second": lambda signs: (signs == 1).all(1),
    }
    for name, test in tests.items():
        hits = test(better).astype(np.float64).tolist()
        interval = mean_interval(hits, clusters)
        row[name] = {"share": float(np.mean(hits)), "interval": replace(interval, note="").ends}
    row["ties"] = 1 - row["first"]["share"] - row["second"]["share"]
    return row


def position_bias(judged: Sequence[Judged]) -> Row:
    """Return how many points the first place is worth: of the same two answers in both orders, so quality cancels.

    `first` and `second` count questions where one place wins in both orders, `p` is that of the sign-flip test.
    """
    scores = _pairs(judged)
    shown_first = np.stack([scores[:, 0, 0] - scores[:, 0, 1], scores[:, 1, 1] - scores[:, 1, 0]], axis=1)
    points = shown_first.mean(1)
    clusters = [one.cluster for one in judged]
    return {
        "points": float(points.mean()),
        "interval": cluster_bootstrap(points.tolist(), clusters).ends,
        "p": sign_flip(points, clusters),
        "first": int((shown_first > 0).all(1).sum()),
        "second": int((shown_first < 0).all(1).sum()),
    }


def tables_of(summary: Row) -> list[Table]:
    """Return relative scores, wins and bias as texts."""
    first, second = summary["systems"]
    relative_rows = [
        [
            *(row["group"], percent(row["relative"]), interval_text(row["interval"])),
            *(f"{score:.2f}" for score in row["scores"]),
            *(percent(ratio) for ratio in row["by_order"]),
            *(str(row["n"]), row["note"]),
        ]
        for row in summary["relative"]
    ]
    wins_rows = [
        [
            row["group"],
            *(f"{percent(row[key]['share'])} ({interval_text(row[key]['interval'])})" for key in ("first", "second")),
            *(percent(row["ties"]), percent(row["same_in_both_orders"]), str(row["n"])),
        ]
        for row in summary["wins"]
    ]
    bias = summary["position"]
    low, high = bias["interval"]
    between = "–" if low is None else f"{low:+.2f} to {high:+.2f}"
    bias_row = [f"{bias['points']:+.2f}", between, f"{bias['p']:.4f}", str(bias["first"]), str(bias["second"])]
    relative_head = ["questions", f"{second} / {first}", "95 % interval", first, second, f"{first} shown first"]
    return [
        Table("Relative score", [*relative_head, f"{second} shown first", "n", ""], relative_rows),
        Table("Wins", ["questions", f"{first} wins", f"{second} wins", "ties", "same in both orders", "n"], wins_rows),
        Table("Place", ["points of the first place", "95 % interval", "p", "first wins twice", "second"], [bias_row]),
    ]
