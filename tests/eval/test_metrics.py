"""Scores against values worked out elsewhere, intervals against tables and against their own promise."""

from __future__ import annotations

import numpy as np
import pytest

from eval.metrics.interval import cluster_bootstrap, mean_interval, wilson
from eval.metrics.text import exact_match
from eval.metrics.vqa import normalise, vqa_accuracy
from eval.task import parse_answer


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        (" red", "red"),
        ("a  big\tred ring \nand more", "a big red ring"),
        ("\n\n two \n", "two"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_parse_takes_the_first_line(raw: str, answer: str) -> None:
    assert parse_answer(raw) == answer


def test_exact_match_forgives_white_space_only() -> None:
    assert exact_match("a red ring", ["a  red ring "]) == 1
    assert exact_match("a red ring", ["a blue ring", "a red ring"]) == 1
    assert exact_match("A red ring", ["a red ring"]) == 0
    assert exact_match("a red ring.", ["a red ring"]) == 0
    assert exact_match("", [""]) == 0  # nothing said is never right


# What the published VQA scorer makes of these, its quirks included.
GOLDEN = {
    "Yes.": "yes",
    "The Dog!": "dog",
    "two": "2",
    "3,000": "3000",
    "dont": "don't",
    "it's 5:30": "it's 5:30",
    "e.g.": "eg",
    "U.S.A.": "usa",
    "red/white": "red white",
    "left-hand": "left hand",
    "none": "0",
    "an apple, the pear": "apple pear",
    "$5.00": "$5.00",
    "12 oz.": "12 oz",
    "no one": "no 1",
    "1 . 5": "1 5",
}


@pytest.mark.parametrize(("raw", "expected"), GOLDEN.items())
def test_vqa_normalisation_has_the_published_quirks(raw: str, expected: str) -> None:
    assert normalise(raw) == expected


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_vqa_accuracy_counts_the_other_annotators(matches: int, score: float) -> None:
    golds = ["Red."] * matches + [f"colour {i}" for i in range(10 - matches)]
    assert vqa_accuracy("red", golds) == pytest.approx(score)


def test_vqa_accuracy_normalises_only_where_annotators_disagree() -> None:
    assert vqa_accuracy("two", ["2"] * 10) == 0
    assert vqa_accuracy("two", ["2"] * 9 + ["3"]) == 1
    assert vqa_accuracy("red", ["red"]) == 1


def test_wilson_equals_published_values() -> None:
    # R: prop.test(x, n, correct = FALSE)$conf.int
    for successes, n, low, high in [
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (50, 100, 0.4038315, 0.5961685),
    ]:
        interval = wilson(successes, n)
        assert interval.low == pytest.approx(low, abs=1e-6)
        assert interval.high == pytest.approx(high, abs=1e-6)
    with pytest.raises(ValueError, match="at least one sample"):
        wilson(0, 0)


def test_bootstrap_knows_clusters_and_not_order() -> None:
    rng = np.random.Generator(np.random.Philox(key=1))
    scores = [float(x) for x in rng.random(40) < 0.7]
    alone = [f"c{i}" for i in range(40)]
    plain = cluster_bootstrap(scores, alone)
    near = wilson(sum(scores), 40)
    assert (plain.low, plain.high) == pytest.approx((near.low, near.high), abs=0.04)
    # Each sample four times over: four times the answers, not a bit more known.
    repeated = cluster_bootstrap(scores * 4, alone * 4)
    assert (repeated.low, repeated.high) == pytest.approx((plain.low, plain.high))
    order = rng.permutation(160)
    moved = cluster_bootstrap([(scores * 4)[i] for i in order], [(alone * 4)[i] for i in order])
    assert (moved.low, moved.high) == (repeated.low, repeated.high)


def test_bootstrap_covers_about_95_percent() -> None:
    rng = np.random.Generator(np.random.Philox(key=2))
    hits = 0
    for _ in range(200):
        scores = (rng.random(100) < 0.4).astype(float).tolist()
        interval = cluster_bootstrap(scores, [str(i) for i in range(100)], resamples=400)
        hits += interval.low <= 0.4 <= interval.high
    assert 180 <= hits <= 199


def test_mean_interval_chooses_the_valid_method() -> None:
    assert mean_interval([1.0, 0.0, 1.0], ["a", "b", "c"]).method == "wilson"
    assert mean_interval([1.0, 0.0, 1.0], ["a", "b", "b"]).method == "bootstrap"
    assert mean_interval([0.3, 0.0, 1.0], ["a", "b", "c"]).method == "bootstrap"
