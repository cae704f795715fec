"""95 % intervals of a mean score.

Two kinds. Wilson's interval is for independent right-or-wrong answers; unlike the normal approximation it stays inside
[0, 1] and is not empty at 0 % or 100 %. When one image carries several questions, or several seeds ask the same
queries, the answers are not independent and Wilson's would be too narrow: then whole images are resampled (a
bootstrap clustered by image), counter-based, so that the interval is the same on every machine and for every order of
the samples.

Several seeds are several choices of demonstrations, and a further choice would give a further score. The two-level
bootstrap draws seeds and images, each with replacement and independently (they are crossed: every seed asks every
query), so its interval is about the score under any demonstrations; the one over images alone is about these. With
two or three seeds the former is itself a rough estimate, on the narrow side (a resample of S seeds has (S - 1) / S of
their variance).

A bootstrap knows only the spread that it sees. Where all images have the same score (or there is only one) it would
say that nothing is uncertain, which is wrong: scores between 0 and 1 then have Wilson's interval, an image being one
trial (no such scores can vary more), and others have none. With few images it is too narrow. `Interval.note` says so.

Letters: N samples, C clusters, S seeds, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution
RESAMPLES = 10_000
FEW = 10
"""Clusters below which a bootstrap's interval is known to be too narrow."""


@dataclass(frozen=True)
class Interval:
    """A 95 % interval and the method that made it: "wilson", "bootstrap" (of images), "two-level bootstrap", or "none".

    Without a method there is no interval, and `low` and `high` are nan. `note` is what a reader has to know about it.
    """

    low: float
    high: float
    method: str
    note: str = ""

    @property
    def ends(self) -> list[float | None]:
        """Both ends as JSON has them: null where there is no interval."""
        return [None if np.isnan(end) else end for end in (self.low, self.high)]


def _percentiles(values: np.ndarray, method: str, clusters: int) -> Interval:
    """Return the percentile interval of a bootstrap's (R,) values, if it has one."""
    low, high = np.nanquantile(values, [0.025, 0.975]) if np.isfinite(values).any() else (np.nan, np.nan)
    images = f"{clusters} image{'s' if clusters > 1 else ''}"
    if np.isnan(low):
        return Interval(np.nan, np.nan, "none", f"no interval: no resample of the {images} has a value")
    if np.isclose(low, high, rtol=1e-9, atol=1e-12):
        alike = "of one image there is no spread" if clusters == 1 else f"all resamples of the {images} score the same"
        return Interval(np.nan, np.nan, "none", f"no interval: {alike}")
    note = f"only {images}: a bootstrap of fewer than {FEW} is too narrow" if clusters < FEW else ""
    return Interval(float(low), float(high), method, note)


def wilson(successes: float, n: int) -> Interval:
    """Return Wilson's score interval of a proportion (Wilson 1927), `n` independent trials.

    Raises:
        ValueError: `n` is not positive.
    """
    if n <= 0:
        raise ValueError(f"an interval needs at least one sample, got n={n}")
    p, z = successes / n, Z95
    centre = p + z * z / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Interval(max(0.0, float((centre - half) / scale)), min(1.0, float((centre + half) / scale)), "wilson")


def cluster_bootstrap(scores: Sequence[float], clusters: Sequence[str], resamples: int = RESAMPLES) -> Interval:
    """Return the percentile bootstrap of the mean of `scores`, whole clusters drawn with replacement.

    The clusters are sorted first and the generator is keyed by a constant, so the order of the samples has no
    influence.
    """
    if not scores:
        raise ValueError("an interval needs at least one sample, got none")
    names, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(inverse, weights=np.asarray(scores, dtype=np.float64))
    counts = np.bincount(inverse).astype(np.float64)
    means = [sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1) for drawn, _ in _draws(len(names), 1, resamples)]
    return _percentiles(np.concatenate(means), "bootstrap", len(names))


def two_level_bootstrap(
    scores: Sequence[float], clusters: Sequence[str], seeds: Sequence[int], resamples: int = RESAMPLES
) -> Interval:
    """Return the percentile bootstrap of the mean; seeds (if several) and clusters are drawn with replacement."""
    if len(set(seeds)) < 2:
        return cluster_bootstrap(scores, clusters, resamples)
    names, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    kinds, seed = np.unique(np.asarray(seeds), return_inverse=True)
    size = len(kinds) * len(names)
    flat_index = seed * len(names) + inverse
    sums = np.bincount(flat_index, weights=np.asarray(scores, dtype=np.float64), minlength=size).reshape(len(kinds), -1)
    counts = np.bincount(flat_index, minlength=size).astype(np.float64).reshape(len(kinds), -1)
    means = []
    for drawn_clusters, drawn_seeds in _draws(len(names), len(kinds), resamples):
        by_seed = (values[:, drawn_clusters].sum(2) for values in (sums, counts))  # (S, r) each
        total, count = ((drawn_seeds.T * values).sum(0) for values in by_seed)
        # A resample may have drawn no sample at all, where not every seed asked every query.
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append(total / count)
    return _percentiles(np.concatenate(means), "two-level bootstrap", len(names))


def _draws(clusters: int, seeds: int, resamples: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield blocks of drawn clusters (r, C), and of how often each seed is drawn (r, S): ones for a single seed."""
    rng = np.random.Generator(np.random.Philox(key=clusters))
    choose = np.random.Generator(np.random.Philox(key=[clusters, seeds]))
    block = max(1, 2_000_000 // (clusters * seeds))  # bounds the memory of the index table
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = rng.integers(0, clusters, size=(size, clusters))
        yield drawn, choose.multinomial(seeds, [1 / seeds] * seeds, size=size).astype(np.float64)


def sample_weights(
    clusters: Sequence[str], seeds: Sequence[int] | None = None, resamples: int = RESAMPLES
) -> Iterator[np.ndarray]:
    """Yield blocks (r, N) of how often each sample is in a resample of whole clusters, and of seeds if several.

    They are the same for any order of the samples.
    """
    names, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    kinds, seed = np.unique(np.asarray(seeds or [0] * len(clusters)), return_inverse=True)
    for drawn, times in _draws(len(names), len(kinds), resamples):
        counts = np.stack([np.bincount(row, minlength=len(names)) for row in drawn]).astype(np.float64)
        yield counts[:, inverse] * times[:, seed]


def statistic_interval(
    statistic: Callable[[np.ndarray], np.ndarray],
    clusters: Sequence[str],
    resamples: int = RESAMPLES,
    seeds: Sequence[int] | None = None,
) -> Interval:
    """Return the percentile bootstrap of a statistic that is not a mean: it takes (r, N) weights and gives (r,) values.

    Resamples for which it has no value (nan: an AUC without negatives) are left out.
    """
    values = np.concatenate([statistic(weights) for weights in sample_weights(clusters, seeds, resamples)])
    method = "two-level bootstrap" if len(set(seeds or ())) > 1 else "bootstrap"
    return _percentiles(values, method, len(set(clusters)))


def mean_interval(scores: Sequence[float], clusters: Sequence[str], seeds: Sequence[int] | None = None) -> Interval:
    """Return Wilson's interval if it is valid (0/1 scores, every cluster once), else a bootstrap, two-level if there
    are several `seeds`; and Wilson's over clusters where a bootstrap of scores in [0, 1] sees no spread."""
    several = seeds is not None and len(set(seeds)) > 1
    count = len(set(clusters))
    if not several and count == len(clusters) and all(score in (0.0, 1.0) for score in scores):
        return wilson(sum(scores), len(scores))
    found = two_level_bootstrap(scores, clusters, seeds or [0] * len(scores))
    if found.method != "none" or not all(0.0 <= score <= 1.0 for score in scores):
        return found
    interval = wilson(float(np.mean(scores)) * count, count)
    alike = "there is one image" if count == 1 else f"all {count} images score the same"
    return replace(interval, note=f"{alike}, so the interval is Wilson's for as many independent answers")
