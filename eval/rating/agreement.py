"""Krippendorff's alpha: how far raters agree beyond chance, whatever their number and whoever is missing.

1 is full agreement, 0 is chance, below 0 is worse than chance. Defined as in Krippendorff, "Computing Krippendorff's
Alpha-Reliability" (2011), by the coincidences of values within units. Letters: U units, V values, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.metrics.interval import Interval, statistic_interval


def alpha(counts: np.ndarray, ordered: bool, weights: np.ndarray | None = None) -> np.ndarray:
    """Return alpha for each row of weights, (R,): nan where it is not defined (no unit of two, or one value only).

    Args:
        counts: (U, V), how many raters gave each value to each unit.
        ordered: values are ranks (ordinal distance) rather than names (nominal).
        weights: (R, U), how often each unit counts; default once.
    """
    weights = np.ones((1, len(counts))) if weights is None else weights
    sizes = counts.sum(1)
    paired = sizes > 1  # a unit with one rating pairs with nothing
    weights, counts, sizes = weights[:, paired], counts[paired].astype(np.float64), sizes[paired]
    pairs = counts[:, :, None] * counts[:, None, :] - np.eye(counts.shape[1]) * counts[:, None, :]
    pairs /= np.maximum(sizes - 1, 1)[:, None, None]
    observed = np.einsum("ru,uvw->rvw", weights, pairs)
    totals = observed.sum(2)  # (R, V)
    expected = totals[:, :, None] * totals[:, None, :] - np.eye(counts.shape[1]) * totals[:, None, :]
    expected /= np.maximum(totals.sum(1) - 1, 1)[:, None, None]
    if ordered:
        middle = totals.cumsum(1) - totals / 2  # of each value's ranks
        distance = (middle[:, :, None] - middle[:, None, :]) ** 2
    else:
        distance = np.broadcast_to(1 - np.eye(counts.shape[1]), observed.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = 1 - (observed * distance).sum((1, 2)) / (expected * distance).sum((1, 2))
    return np.where(np.isfinite(value), value, np.nan)


def alpha_interval(counts: np.ndarray, ordered: bool, clusters: Sequence[str]) -> Interval:
    """Return the bootstrap interval of alpha over clusters of units."""
    return statistic_interval(lambda weights: alpha(counts, ordered, weights), clusters)
