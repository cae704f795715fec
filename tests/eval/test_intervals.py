"""Intervals over images and over choices of demonstrations."""

from __future__ import annotations

import numpy as np
import pytest

from eval.metrics.interval import cluster_bootstrap, mean_interval, statistic_interval, two_level_bootstrap

Scores = tuple[list[float], list[str], list[int]]


def crossed(seeds: int, images: int, seed_spread: float, key: int = 0) -> Scores:
    """Every seed asks about every image; a seed moves all its scores."""
    rng = np.random.Generator(np.random.Philox(key=key))
    moves = rng.normal(0, seed_spread, size=seeds)
    own = rng.normal(0, 1, size=images)
    values = moves[:, None] + own + rng.normal(0, 0.3, size=(seeds, images))
    names = [str(image) for _ in range(seeds) for image in range(images)]
    return values.flatten().tolist(), names, [seed for seed in range(seeds) for _ in range(images)]


def test_one_seed_is_the_bootstrap_over_images() -> None:
    scores, images, seeds = crossed(1, 40, 1.0)
    assert two_level_bootstrap(scores, images, seeds) == cluster_bootstrap(scores, images)
    assert mean_interval([1.0, 0.0], ["a", "b"], [0, 0]).method == "wilson"


def test_seeds_that_differ_widen_the_interval_and_equal_ones_do_not() -> None:
    for spread, wider in ((0.0, False), (1.0, True)):
        scores, images, seeds = crossed(5, 200, spread)
        one, two = cluster_bootstrap(scores, images), two_level_bootstrap(scores, images, seeds)
        widths = one.high - one.low, two.high - two.low
        assert (widths[1] > 1.5 * widths[0]) == wider
        assert two.method == "two-level bootstrap"
        assert two.low <= np.mean(scores) <= two.high


def test_neither_order_nor_names_of_seeds_matter() -> None:
    scores, images, seeds = crossed(3, 30, 0.5)
    order = np.random.Generator(np.random.Philox(key=1)).permutation(len(scores))
    moved = [[values[i] for i in order] for values in (scores, images, seeds)]
    found = two_level_bootstrap(*moved)  # type: ignore[arg-type]
    expected = two_level_bootstrap(scores, images, seeds)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    named = two_level_bootstrap(scores, images, [40 + seed for seed in seeds])
    assert named == expected


def test_a_mean_written_as_a_statistic_has_the_same_interval() -> None:
    scores, images, seeds = crossed(4, 50, 0.7)
    values = np.array(scores)
    found = statistic_interval(lambda w: (w @ values) / w.sum(1), images, 10_000, seeds)
    expected = two_level_bootstrap(scores, images, seeds)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found.method == expected.method


def test_the_interval_holds_the_true_score_about_as_often_as_it_says() -> None:
    held = 0
    for key in range(100):
        scores, images, seeds = crossed(12, 40, 0.3, key=key + 10)
        found = two_level_bootstrap(scores, images, seeds, 400)
        held += found.low <= 0 <= found.high
    assert 86 <= held <= 99
