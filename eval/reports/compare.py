"""Two runs on the same queries: is the difference more than chance?

The scores are paired by query (each the mean over seeds), so a query's difficulty cancels. Queries about one image are
not independent: the interval resamples images, the test flips the sign of an image's whole difference. Runs with the
same seeds, if there are several, are also paired by seed, and the interval resamples seeds and images like that of a
single score: it is about any choice of demonstrations, while the tests are about these. For right-or-wrong scores
McNemar's exact test is reported as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.metrics.interval import Interval, cluster_bootstrap, two_level_bootstrap
from eval.reports.results import groups_of, interval_text, task_width
from eval.reports.saved_run import SavedRun
from eval.samples import Sample
from flamingo.errors import UserError

FLIPS = 10_000
POWER = (1.959963984540054 + 0.8416212335729143) ** 2  # 5 % two-sided, 80 % power


@dataclass(frozen=True)
class Comparison:
    """One setting in both runs. `difference` is second minus first; `p` of the sign-flip test, `p_mcnemar` or None.

    `n_needed`: queries with which such a difference is significant (5 %) in four runs out of five; None if it is 0.
    """

    task: str
    first: str
    second: str
    shots: int
    images: str
    n: int
    scores: tuple[float, float]
    difference: float
    interval: tuple[float, float]  # nan where there is none
    interval_method: str
    p: float
    p_mcnemar: float | None
    same_demonstrations: bool
    n_needed: int | None
    note: str = ""


def compare(first: SavedRun, second: SavedRun) -> list[Comparison]:
    """Return every setting that both runs have; if each has a single strategy and they differ, these are compared.

    Raises:
        UserError: no setting in common, or the queries or their gold answers are not the same.
    """
    ours, theirs = groups_of(first.samples), groups_of(second.samples)
    strategies = [sorted({key[1] for key in groups}) for groups in (ours, theirs)]
    across = strategies[0] != strategies[1] and len(strategies[0]) == len(strategies[1]) == 1
    comparisons = []
    for key, samples in ours.items():
        task, strategy, shots, images = key
        other = theirs.get((task, strategies[1][0] if across else strategy, shots, images))
        if other is not None:
            comparisons.append(compare_samples(samples, other))
    if not comparisons:
        raise UserError(
            f"{first.folder} and {second.folder} have no setting (task, strategy, shots, images) in common; "
            "compare runs of the same tasks and shots"
        )
    return comparisons


def compare_samples(first: Sequence[Sample], second: Sequence[Sample]) -> Comparison:
    """Compare two lists of samples of the same queries."""
    cell, other = first[0].cell, second[0].cell
    ours, theirs = _by_query(first), _by_query(second)
    where = f"{cell.task}, {cell.shots} shots"
    if ours.keys() != theirs.keys():
        only = sorted(ours.keys() ^ theirs.keys())
        raise UserError(
            f"{where}: {len(only)} queries are in only one run, the first is {only[0]}; give both the same limit"
        )
    for query_id, samples in ours.items():
        if samples[0].golds != theirs[query_id][0].golds:
            raise UserError(f"{where}: query {query_id} has different gold answers in the two runs: the data differ")
    # A query counts once, however many seeds asked it.
    a, b = (np.array([np.mean([s.score for s in groups[q]]) for q in ours]) for groups in (ours, theirs))
    clusters = [samples[0].cluster for samples in ours.values()]
    difference = b - a
    interval = _interval(ours, theirs)
    spread = float(difference.var(ddof=1)) if len(a) > 1 else 0.0
    mean = float(difference.mean())
    return Comparison(
        task=cell.task,
        first=cell.strategy,
        second=other.strategy,
        shots=cell.shots,
        images=cell.images,
        n=len(a),
        scores=(float(a.mean()), float(b.mean())),
        difference=mean,
        interval=(interval.low, interval.high),
        interval_method=interval.method,
        p=sign_flip(difference, clusters),
        p_mcnemar=mcnemar(a, b),
        same_demonstrations=all(_demos(ours[q]) == _demos(theirs[q]) for q in ours),
        n_needed=int(np.ceil(POWER * spread / mean**2)) if mean else None,
        note=interval.note,
    )


def _by_query(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    by_query: dict[str, list[Sample]] = {}
    for sample in samples:
        by_query.setdefault(sample.query_id, []).append(sample)
    return by_query


def _interval(first: Mapping[str, Sequence[Sample]], second: Mapping[str, Sequence[Sample]]) -> Interval:
    """Return the interval of the difference; runs with different seeds cannot be paired by seed, only by image."""
    scores: list[float] = []
    clusters: list[str] = []
    seeds: list[int] = []
    sets = {
        tuple(sorted(sample.cell.seed for sample in group)) for groups in (first, second) for group in groups.values()
    }
    for query_id, samples in first.items():
        ours, theirs = ({sample.cell.seed: sample.score for sample in group} for group in (samples, second[query_id]))
        if len(sets) == 1:
            scores += [theirs[seed] - score for seed, score in ours.items()]
            clusters += [samples[0].cluster] * len(ours)
            seeds += list(ours)
        else:
            scores.append(float(np.mean(list(theirs.values())) - np.mean(list(ours.values()))))
            clusters.append(samples[0].cluster)
    return two_level_bootstrap(scores, clusters, seeds) if seeds else cluster_bootstrap(scores, clusters)


def _demos(samples: Sequence[Sample]) -> list[tuple[int, tuple[str, ...]]]:
    return sorted((sample.cell.seed, sample.demo_ids) for sample in samples)


def sign_flip(differences: np.ndarray, clusters: Sequence[str]) -> float:
    """Return the two-sided p: how often the sum is as far from 0 if each cluster's sign is random; never 0."""
    names, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(inverse, weights=differences)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    rng = np.random.Generator(np.random.Philox(key=len(names)))
    hits, block = 0, max(1, 2_000_000 // len(sums))
    for start in range(0, FLIPS, block):
        signs = rng.integers(0, 2, size=(min(block, FLIPS - start), len(sums))) * 2 - 1
        hits += int((np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9).sum())
    return (hits + 1) / (FLIPS + 1)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return McNemar's exact two-sided p for scores of 0 and 1; None for others."""
    from scipy.stats import binomtest

    if not set(np.unique(a)) | set(np.unique(b)) <= {0.0, 1.0}:
        return None
    better, worse = int((b > a).sum()), int((b < a).sum())
    return 1.0 if better + worse == 0 else float(binomtest(better, better + worse, 0.5).pvalue)


def lines(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the comparisons as lines for the terminal."""
    width = task_width(row.task for row in comparisons)
    head = f"{'task':<{width}}{'setting':<26}{'shots':>5}{'first':>8}{'second':>8}{'change':>8}   {'95 % interval':<17}"
    lines = [f"{head}{'p':>8}{'McNemar':>9}{'n':>7}  demos"]
    for row in comparisons:
        what = row.first if row.first == row.second else f"{row.first} > {row.second}"
        what += "" if row.images == "real" else f" {row.images}"
        exact = "-" if row.p_mcnemar is None else f"{row.p_mcnemar:.4f}"
        lines.append(
            f"{row.task:<{width}}{what:<26}{row.shots:>5}{100 * row.scores[0]:>8.1f}{100 * row.scores[1]:>8.1f}"
            f"{100 * row.difference:>+8.1f}   {interval_text(row.interval, '+.1f'):<17}{row.p:>8.4f}{exact:>9}"
            f"{row.n:>7}  {'same' if row.same_demonstrations else 'different'}"
        )
        lines += [f"  {row.note}"] if row.note else []
    return lines


def differing_definitions(first: SavedRun, second: SavedRun) -> dict[str, list[str]]:
    """Return, for each task in both runs, the keys in which its definitions differ."""
    differing: dict[str, list[str]] = {}
    for name, task in first.results["tasks"].items():
        other: dict[str, Any] | None = second.results["tasks"].get(name)
        if other is not None and task["hash"] != other["hash"]:
            ours, theirs = task["definition"], other["definition"]
            keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            differing[name] = keys or ["data"]
    return differing
