"""Selective prediction: the score of a model that may decline to answer, by its confidence.

Samples of equal confidence cannot be ordered (a vote of eleven has eleven levels), so a curve is the expectation over
all orders among them; nothing here depends on the order of the samples. Risk is 1 - score, so scores between 0 and 1
(VQA accuracy) need no threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COVERAGES = (1.0, 0.9, 0.8, 0.55, 0.5)  # 0.55 is the deferral of 0.45 that medical question answering reports
BINS = 15
POINTS = 20
"""Points of the curve that the results keep."""


@dataclass(frozen=True)
class Selective:
    """`risk` at `POINTS` equal steps of coverage up to 1.

    `aurc` is the area under that curve (the mean risk over all coverages), `e_aurc` the part of it that is due to the
    order of the confidences; `ece` the expected calibration error over 15 bins of equal mass; `brier` the mean squared
    difference of confidence and score.
    """

    risk: tuple[float, ...]
    aurc: float
    e_aurc: float
    score_at: dict[str, float]
    ece: float
    brier: float


def selective(scores: Sequence[float], confidences: Sequence[float]) -> Selective:
    """Return all measures for one setting.

    Raises:
        ValueError: no samples, or not as many confidences.
    """
    if not scores or len(scores) != len(confidences):
        raise ValueError(f"{len(scores)} scores and {len(confidences)} confidences; as many of both, at least one")
    score, sure = np.asarray(scores, dtype=np.float64), np.asarray(confidences, dtype=np.float64)
    expected, ordered = _shared_among_equals(score, sure)
    counts = np.arange(1, len(score) + 1)
    risk = np.cumsum(1 - expected) / counts
    best = np.cumsum(np.sort(1 - score)) / counts
    positions = [max(1, round(len(score) * (point + 1) / POINTS)) - 1 for point in range(POINTS)]
    at = {f"{share:g}": float(1 - risk[max(1, round(len(score) * share)) - 1]) for share in COVERAGES}
    bins = [part for part in np.array_split(np.arange(len(score)), BINS) if len(part)]
    gaps = [abs(float(ordered[part].mean() - expected[part].mean())) * len(part) for part in bins]
    return Selective(
        risk=tuple(round(float(risk[position]), 6) for position in positions),
        aurc=float(risk.mean()),
        e_aurc=float(risk.mean() - best.mean()),
        score_at=at,
        ece=sum(gaps) / len(score),
        brier=float(np.mean((sure - score) ** 2)),
    )


def _shared_among_equals(score: np.ndarray, sure: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, confidences) from the surest on, each group of equal confidence with its mean score."""
    levels, group = np.unique(-sure, return_inverse=True)
    means = np.bincount(group, weights=score) / np.bincount(group)
    order = np.sort(group)
    return means[order], -levels[order]
