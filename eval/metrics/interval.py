"""95 % intervals of a mean score.

Two kinds. Wilson's interval is for independent right-or-wrong answers; unlike the normal approximation it stays inside
[0, 1] and is not empty at 0 % or 100 %. When one picture carries several questions, or several seeds ask the same
queries, the answers are not independent and Wilson's would be too narrow: then whole pictures are resampled (a
bootstrap clustered by picture), counter-based, so that the interval is the same on every machine and for every order of
the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A 95 % interval of a mean and the method that made it: "wilson" or "bootstrap"."""

    low: float
    high: float
    method: str


def wilson(successes: float, n: int, z: float = Z95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927), `n` independent trials.

    Raises:
        ValueError: `n` is not positive.
    """
    if n <= 0:
        raise ValueError(f"an interval needs at least one sample, got n={n}")
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Interval(max(0.0, float((centre - half) / scale)), min(1.0, float((centre + half) / scale)), "wilson")


def cluster_bootstrap(scores: Sequence[float], clusters: Sequence[str], resamples: int = RESAMPLES) -> Interval:
    """Percentile bootstrap of the mean of `scores`, whole clusters drawn with replacement.

    The clusters are sorted first and the generator is keyed by a constant, so the order of the samples has no
    influence.
    """
    if not scores:
        raise ValueError("an interval needs at least one sample, got none")
    names, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(inverse, weights=np.asarray(scores, dtype=np.float64))
    counts = np.bincount(inverse).astype(np.float64)
    rng = np.random.Generator(np.random.Philox(key=len(names)))
    means = np.empty(resamples)
    block = max(1, 2_000_000 // len(names))  # bounds the memory of the index table
    for start in range(0, resamples, block):
        draw = rng.integers(0, len(names), size=(min(block, resamples - start), len(names)))
        means[start : start + len(draw)] = sums[draw].sum(axis=1) / counts[draw].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(low), float(high), "bootstrap")


def cluster_weights(clusters: Sequence[str], resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """Blocks (r, N) of how often each sample is in a resample of whole clusters; the same for any order of samples."""
    names, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    rng = np.random.Generator(np.random.Philox(key=len(names)))
    block = max(1, 1_000_000 // len(clusters))
    for start in range(0, resamples, block):
        draw = rng.integers(0, len(names), size=(min(block, resamples - start), len(names)))
        counts = np.stack([np.bincount(row, minlength=len(names)) for row in draw]).astype(np.float64)
        yield counts[:, inverse]


def statistic_interval(
    statistic: Callable[[np.ndarray], np.ndarray], clusters: Sequence[str], resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap of a statistic that is no mean: it takes (r, N) weights and gives (r,) values.

    Resamples for which it has no value (nan: an AUC without negatives) are left out.
    """
    values = np.concatenate([statistic(weights) for weights in cluster_weights(clusters, resamples)])
    low, high = np.nanquantile(values, [0.025, 0.975]) if np.isfinite(values).any() else (np.nan, np.nan)
    return Interval(float(low), float(high), "bootstrap")


def mean_interval(scores: Sequence[float], clusters: Sequence[str]) -> Interval:
    """Wilson's interval where it is valid (0/1 scores, every cluster once), else the clustered bootstrap."""
    independent = len(set(clusters)) == len(clusters)
    if independent and all(score in (0.0, 1.0) for score in scores):
        return wilson(sum(scores), len(scores))
    return cluster_bootstrap(scores, clusters)
