"""Intervals over images and over choices of demonstrations."""

from __future__ import annotations

import numpy as np
import pytest

from eval.metrics.interval import cluster_bootstrap, mean_interval, statistic_interval, two_level_bootstrap, wilson
from eval.metrics.table import measure
from eval.reports.compare import compare_samples, lines
from eval.reports.results import summary, table
from eval.task import Baselines
from tests.eval.test_metrics_table import answered

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


@pytest.mark.parametrize("score", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_scores_have_wilsons_interval_over_images_not_an_empty_one(score: float, seeds: int) -> None:
    """Each image asked twice: eight images are at most eight independent answers."""
    images = [str(index // 2) for index in range(16)] * seeds
    found = mean_interval([score] * len(images), images, [seed for seed in range(seeds) for _ in range(16)])
    expected = wilson(8 * score, 8)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.high - found.low > 0.3
    assert "all 8 images score the same" in found.note


def test_what_is_no_share_and_does_not_vary_has_no_interval_and_says_so() -> None:
    for found in (mean_interval([2.5] * 6, list("abcdef")), cluster_bootstrap([0.0] * 4, list("aabb"))):
        assert found.ends == [None, None]
        assert (found.method, found.note[:11]) == ("none", "no interval")
    of_one = statistic_interval(lambda weights: weights.sum(1) * 0 + 0.7, ["a", "a"])
    assert of_one.ends == [None, None]
    assert "of one image there is no spread" in of_one.note
    nothing = statistic_interval(lambda weights: weights.sum(1) * np.nan, ["a", "b"])
    assert "no resample of the 2 images has a value" in nothing.note


def test_few_images_are_noted_and_many_are_not() -> None:
    scores = [0.1, 0.9, 0.4, 0.6]
    assert "only 4 images" in mean_interval(scores, list("abcd")).note
    assert mean_interval(scores * 5, [str(index) for index in range(20)]).note == ""
    assert mean_interval([1.0, 0.0], ["a", "b"]).note == ""  # Wilson's needs no many


def test_a_reader_of_results_sees_why_there_is_no_interval_and_why_cider_is_0() -> None:
    answers = [answered("q", "a dog runs", ("a dog runs", "the dog"), cluster="image")]
    row = summary(answers, Baselines(None, None, None), ["captions"], "cider")
    assert row["metrics"]["cider"]["score"] == 0
    assert row["metrics"]["cider"]["low"] is None
    assert "every n-gram is in all images" in row["metrics"]["cider"]["note"]
    shown = table({"rows": [row]})
    assert "cider: CIDEr of one image is 0 whatever its caption says" in shown
    two = [*answers, answered("r", "a cat", ("a cat", "the cat sits"), cluster="other")]
    assert measure(["captions"], two)["cider"]["score"] > 0
    scored = [answered(str(index), "x", ("y",), cluster=str(index)) for index in range(3)]
    same = compare_samples(scored, scored)
    assert np.isnan(same.interval).all()
    assert "no interval: all resamples of the 3 images score the same" in "\n".join(lines([same]))
