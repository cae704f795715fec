"""Selective prediction against what can be worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from eval.metrics.selective import selective


def by_hand(scores: list[float], sure: list[float]) -> float:
    """Mean over all orders that agree with the confidences of the mean risk over coverages."""
    areas = []
    for order in itertools.permutations(range(len(scores))):
        if all(sure[a] >= sure[b] for a, b in itertools.pairwise(order)):
            risks = np.cumsum([1 - scores[i] for i in order]) / np.arange(1, len(scores) + 1)
            areas.append(risks.mean())
    return float(np.mean(areas))


@pytest.mark.parametrize("sure", [[0.9, 0.8, 0.5, 0.4, 0.1], [0.5] * 5, [1.0, 0.5, 0.5, 0.5, 0.2]])
@pytest.mark.parametrize("scores", [[1.0, 1, 0, 1, 0], [0.0, 0, 1, 1, 0.3]])
def test_ties_are_the_mean_over_their_orders(scores: list[float], sure: list[float]) -> None:
    found = selective(scores, sure)
    assert found.aurc == pytest.approx(by_hand(scores, sure))
    assert found.score_at["1"] == pytest.approx(np.mean(scores))
    assert found.risk[-1] == pytest.approx(1 - np.mean(scores), abs=1e-6)
    shuffled = np.random.default_rng(0).permutation(5)
    again = selective([scores[i] for i in shuffled], [sure[i] for i in shuffled])
    assert again == found


def test_a_model_that_knows_what_it_knows_has_no_excess() -> None:
    scores = [1.0] * 6 + [0.0] * 4
    best = selective(scores, [1.0] * 6 + [0.0] * 4)
    assert best.e_aurc == pytest.approx(0)
    assert best.score_at["0.5"] == 1.0
    assert (best.ece, best.brier) == (0.0, 0.0)
    worst = selective(scores, [0.0] * 6 + [1.0] * 4)
    assert worst.score_at["0.5"] == pytest.approx(0.2)
    assert worst.ece == worst.brier == 1.0
    even = selective(scores, [0.6] * 10)
    assert even.ece == pytest.approx(0)
    assert even.aurc == pytest.approx(0.4)


def test_nothing_to_judge_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 scores"):
        selective([], [])
    with pytest.raises(ValueError, match="2 scores and 1 conf"):
        selective([1.0, 0.0], [0.5])
