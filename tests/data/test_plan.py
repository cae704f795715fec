"""The order of samples: every one once an epoch, and nothing but seed and place decides it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import NEAR_ATTEMPTS, Plan, default_lanes, stream
from flamingo.errors import UserError


def epoch_of(plan: Plan, epoch: int) -> list[tuple[int, int]]:
    span = range(epoch * plan.length, (epoch + 1) * plan.length)
    found = [plan.at(lane, n) for lane in range(plan.lanes) for n in span]
    assert {slot.epoch for slot in found} == {epoch}
    return [(slot.shard, slot.row) for slot in found]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    lanes=st.integers(1, 9),
    block=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_sample_once_an_epoch(counts: list[int], lanes: int, block: int, seed: int) -> None:
    plan = Plan(np.array(counts), seed, lanes * 2, lanes, block)
    every = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    for epoch in (0, 1, 5):
        seen = Counter(epoch_of(plan, epoch))
        assert set(seen) == every
        assert sum(seen.values()) - len(every) < lanes  # the wrap


def test_epochs_seeds_and_lanes_differ_and_repeat_exactly() -> None:
    counts = np.array([50, 70, 60, 20])
    first = epoch_of(Plan(counts, 3, 8, 4, 2), 0)
    assert first == epoch_of(Plan(counts, 3, 8, 4, 2), 0)
    assert first != epoch_of(Plan(counts, 3, 8, 4, 2), 1)
    assert first != epoch_of(Plan(counts, 4, 8, 4, 2), 0)


@pytest.mark.parametrize("lanes", [1, 4])
def test_with_one_shard_every_epoch_seed_and_lane_has_an_order_of_its_own(lanes: int) -> None:
    """The order of the shards says nothing here: it is the permutation inside the block that must differ."""
    orders = [epoch_of(Plan(np.array([60]), seed, 8, lanes), epoch) for seed in (3, 4) for epoch in range(3)]
    inside = [
        [row - lane * len(order) // lanes for _, row in order[lane * len(order) // lanes :][: len(order) // lanes]]
        for order in orders
        for lane in range(lanes)
    ]
    assert len({tuple(rows) for rows in inside}) == 6 * lanes
    assert all(sorted(rows) == list(range(60 // lanes)) for rows in inside)


def test_global_batch_of_the_docstring() -> None:
    plan = Plan(np.array([10]), 0, 4, 2)
    lanes = [[plan.at(lane, n) for n in range(10)] for lane in range(2)]
    batch = [plan.at(*plan.place(slot, 2 * plan.per_lane)) for slot in range(4)]
    assert batch == [*lanes[0][4:6], *lanes[1][4:6]]
    assert [slot.epoch for slot in batch] == [0, 1, 0, 1]


def test_asking_out_of_order_changes_nothing() -> None:
    counts = np.array([5, 9, 4, 11, 3])
    plan, fresh = Plan(counts, 1, 6, 3, 2), Plan(counts, 1, 6, 3, 2)
    places = [(lane, n) for lane in range(3) for n in range(60)]
    there = {place: plan.at(*place) for place in places}
    for index in np.random.default_rng(0).permutation(len(places)):
        assert fresh.at(*places[index]) == there[places[index]]


def test_step_one_million_is_near() -> None:
    plan = Plan(np.full(2000, 5000), 0, 256, 64)  # ten million documents
    first = [plan.at(*plan.place(slot, 0)) for slot in range(256)]
    at_first, plan.drawn = plan.drawn, 0
    batch = [plan.at(*plan.place(slot, 1_000_000 * plan.per_lane)) for slot in range(256)]
    assert len({(slot.shard, slot.row) for slot in first}) == 256
    assert plan.drawn <= 2 * at_first  # the work of the first step; where a block ends, of two of them
    assert len({(slot.shard, slot.row) for slot in batch}) == 256


def test_replacement_is_a_function_of_its_place_and_stays_in_the_block() -> None:
    counts = np.array([6, 6, 6, 6])
    plan, again = Plan(counts, 7, 2, 2, 1), Plan(counts, 7, 2, 2, 1)
    for n in range(12):
        shard = plan.at(1, n).shard
        tries = [plan.replacement(1, n, attempt) for attempt in range(1, 9)]
        assert tries == [again.replacement(1, n, attempt) for attempt in range(1, 9)]
        assert {slot.shard for slot in tries[:NEAR_ATTEMPTS]} == {shard}
        assert len(set(tries)) > 2


def test_streams_of_different_purposes_share_nothing() -> None:
    draws = {
        stream(0, purpose, *place).integers(2**60) for purpose in (1, 2) for place in ((0,), (1,), (0, 1), (0, 0, 1))
    }
    assert len(draws) == 8


def test_lanes_divide_the_batch() -> None:
    assert [default_lanes(b) for b in (1, 6, 96, 256, 100)] == [1, 2, 32, 64, 4]
    with pytest.raises(UserError, match="not a multiple"):
        Plan(np.array([5]), 0, 6, 4)
    with pytest.raises(UserError, match="no samples"):
        Plan(np.array([0, 0]), 0, 4, 4)
