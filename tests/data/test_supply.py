"""Batches made ahead by a thread or by processes: the same ones, their errors, and who is named when they stop."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from data.batches.collate import FlamingoCollate
from data.dataset import DatasetSpec
from data.loading.loader import MixLoader
from data.loading.workers import Ahead
from data.shards.reader import RawSample
from flamingo.errors import UserError
from tests.data.helpers import byte_processor, same, shards_of, write_documents

COLLATE = FlamingoCollate(byte_processor())


def one(folder: Path, **options: Any) -> DatasetSpec:
    values: dict[str, Any] = {"name": "d", "shards": [str(folder)], "batch_size": 4}
    return DatasetSpec(**(values | options))


class Failing:
    """A collate of the user's with a mistake in it, and one that takes its process down."""

    def __init__(self, what: str) -> None:
        self.what = what

    def sample(self, spec: DatasetSpec, raw: RawSample, random: np.random.Generator) -> Any:
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return raw.meta["no such key"]

    def batch(self, spec: DatasetSpec, samples: list[Any]) -> dict[str, Tensor]:
        return {}


def test_a_thread_ahead_changes_nothing(tmp_path: Path) -> None:
    specs = [one(write_documents(tmp_path), batch_size=8)]
    ahead, in_turn = (MixLoader(specs, COLLATE, prefetch_factor=depth) for depth in (3, 0))
    for mine, other in zip(itertools.islice(ahead, 6), itertools.islice(in_turn, 6), strict=True):
        assert mine.step == other.step
        assert same(mine.batches["d"][0].tensors, other.batches["d"][0].tensors)
    assert ahead.state_dict() == in_turn.state_dict()


def test_the_thread_is_ahead_by_its_depth_and_ends_with_the_loop(tmp_path: Path) -> None:
    made: list[int] = []

    def make(place: int) -> int:
        made.append(place)
        return place

    supply = Ahead(make, itertools.count(), 3, 5.0)
    assert [supply.take() for _ in range(2)] == [0, 1]
    deadline = time.monotonic() + 5
    while len(made) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert made == list(range(6))  # two taken, three ready, one in hand
    supply.close()
    assert not supply._thread.is_alive()

    before = threading.active_count()
    loop = iter(MixLoader([one(write_documents(tmp_path))], COLLATE))
    next(loop)
    assert threading.active_count() == before + 1
    del loop
    assert threading.active_count() == before


@pytest.mark.parametrize("options", [{"prefetch_factor": 0}, {}, {"num_workers": 1}])
def test_a_programming_error_is_raised_at_once(tmp_path: Path, options: dict[str, Any]) -> None:
    loader = MixLoader([one(write_documents(tmp_path))], Failing("key"), **options)
    with pytest.raises(KeyError, match="no such key"):
        next(iter(loader))
    assert loader.bad.total == 0


@pytest.mark.slow
def test_a_killed_worker_names_its_sample(tmp_path: Path) -> None:
    loader = MixLoader([one(write_documents(tmp_path))], Failing("kill"), num_workers=1, rank=0)
    with pytest.raises(UserError) as caught:
        next(iter(loader))
    text = str(caught.value)
    assert "a loader process ended" in text
    assert "rank 0: worker 0 is at step 0, dataset 'd', shard" in text
    assert "documents-00000" in text
    assert "\n" not in text


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_hanging_read_is_named_and_ends_the_run(
    tmp_path: Path, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_documents(tmp_path, count=4)
    specs = [one(folder, batch_size=4, lanes=1)]
    loader = MixLoader(
        specs, COLLATE, rank=1, world_size=2, num_workers=workers, patience=0.5, give_up=1.6, prefetch_factor=1
    )
    shards_of(loader).indexes[0]  # known; the tar itself is not open yet
    shard = folder / "documents-000000.tar"
    shard.unlink()
    os.mkfifo(shard)  # to open it waits for a writer who never comes
    with pytest.raises(UserError) as caught:
        next(iter(loader))
    named = r"rank 1: worker 0 is at step 0, dataset 'd', shard .*documents-000000.tar, sample \d for \d s"
    assert re.match(r"no batch for \d s; " + named, str(caught.value))
    assert "the run stops (limit 2 s)" in str(caught.value)
    assert "warning: no batch for" in capfd.readouterr().err
    with shard.open("wb"):  # let the thread go
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_ends_while_the_trainer_computes_is_reported_with_the_next_batch(
    tmp_path: Path, number: int
) -> None:
    loader = MixLoader([one(write_documents(tmp_path))], COLLATE, num_workers=2, prefetch_factor=1)
    held_out = MixLoader([one(tmp_path)], COLLATE, num_workers=1)
    steps, others = iter(loader), iter(held_out)
    earlier = {child.pid for child in multiprocessing.active_children()}  # of other tests, not yet gone
    next(steps)
    victim = next(pid for child in multiprocessing.active_children() if (pid := child.pid) and pid not in earlier)
    next(others)
    os.kill(victim, number)
    os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)
    saved = sum(range(100_000))  # what the trainer does meanwhile is not interrupted
    assert saved == 4_999_950_000
    with pytest.raises(UserError, match=rf"a loader process ended: DataLoader worker \(pid.*{victim}"):
        deque(steps, maxlen=0)
    steps.close()  # type: ignore[attr-defined]
    others.close()  # type: ignore[attr-defined]
