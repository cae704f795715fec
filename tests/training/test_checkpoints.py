"""When checkpoints are written, which stay, and what happens when they cannot be."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flamingo.errors import UserError
from flamingo.training.checkpoints import store
from flamingo.training.checkpoints.ema import Ema
from flamingo.training.checkpoints.store import Checkpoints
from flamingo.training.config import RunConfig
from flamingo.training.distributed.fsdp import Processes
from flamingo.training.distributed.interruptions import StopSignals
from tests.training.world import save_checkpoint

ALONE = Processes(0, 1, torch.device("cpu"))


def toy(width: int = 4) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(width, width)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def update(model: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(1, model.in_features)).sum().backward()
    optimizer.step()


@contextmanager
def checkpoints(root: Path, options: RunConfig, width: int = 4) -> Iterator[Checkpoints]:
    model, optimizer = toy(width)
    update(model, optimizer)
    made = Checkpoints(root, model, optimizer, ALONE, options)
    try:
        yield made
    finally:
        made.close()


def test_the_newest_and_every_nth_stay(tmp_path: Path) -> None:
    options = RunConfig(keep_last=2)
    options.checkpoint.keep_every = 3
    with checkpoints(tmp_path, options) as made:
        for step in range(1, 9):
            made.save(step, {"step": step}, wait=False)
        made.finish()
    assert [step for step, _ in store.step_folders(tmp_path)] == [3, 6, 7, 8]


def test_written_in_the_background_it_is_what_it_was_when_asked(tmp_path: Path) -> None:
    model, optimizer = toy()
    update(model, optimizer)
    made = Checkpoints(tmp_path, model, optimizer, ALONE, RunConfig())
    then = model.weight.detach().clone()
    path = made.save(1, {}, wait=False)
    for _ in range(20):
        update(model, optimizer)  # in place, while it is being written
    made.finish()
    made.close()
    other, fresh = toy()
    store.load(path, other, fresh)
    assert torch.equal(other.weight, then)


def test_due_by_updates_by_minutes_and_when_asked_to_stop(tmp_path: Path) -> None:
    options = RunConfig(checkpoint_every=10)
    options.checkpoint.minutes = 0.001
    with checkpoints(tmp_path, options) as made:
        assert [made.due(step, [0.0, 0.0, 0.0]) for step in (9, 10)] == [False, True]
        time.sleep(0.1)
        assert made.votes() == [0.0, 1.0, 0.0]
        made.save(3, {}, wait=True)
        assert made.votes() == [0.0, 0.0, 0.0]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert made.votes()[0] == 1.0
        assert made.due(3, [1.0, 0.0, 0.0])
        stopped = made.signals.stopped("saved")
        assert (stopped.status, str(stopped)[:19]) == (128 + signal.SIGUSR1, "stopped by SIGUSR1,")
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_second_interrupt_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    signals = StopSignals(60.0)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's
        assert signals.signum == signal.SIGINT
        monkeypatch.setattr("flamingo.training.distributed.interruptions.AGAIN_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signals.close()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Files of this process end there, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(tmp_path: Path, background: bool) -> None:
    options = RunConfig()
    options.checkpoint.background = background
    with checkpoints(tmp_path, options, width=200) as made:
        good = made.save(1, {"step": 1}, wait=True)
        with files_of_at_most(100_000), pytest.raises(UserError, match="cannot be written") as caught:  # noqa: PT012
            made.save(2, {"step": 2}, wait=False)
            while not made.votes()[2]:
                time.sleep(0.01)
            made.due(2, made.votes())
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
        assert [path for _, path in store.step_folders(tmp_path)] == [good]
        assert not list(tmp_path.glob("step-00000002"))  # what it had of the disk is free again
        assert made.save(3, {"step": 3}, wait=True) == store.newest(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_sentence() -> None:
    with (
        checkpoints(Path("/proc/checkpoints"), RunConfig()) as made,
        pytest.raises(UserError, match=r"checkpoint /proc/checkpoints/step-00000001 cannot be written \(\w+: "),
    ):
        made.save(1, {}, wait=False)


def test_a_checkpoint_that_lost_its_end_is_passed_over(tmp_path: Path) -> None:
    with checkpoints(tmp_path, RunConfig()) as made:
        for step in (1, 2):
            made.save(step, {"step": step}, wait=True)
    (data,) = (tmp_path / "step-00000002").glob("*.distcp")
    os.truncate(data, data.stat().st_size // 2)
    assert "bytes" in store.damage(tmp_path / "step-00000002")
    assert store.newest(tmp_path) == tmp_path / "step-00000001"
    with checkpoints(tmp_path, RunConfig()) as made:
        made.save(2, {"step": 2}, wait=True)  # not into the damaged one
    assert store.newest(tmp_path) == tmp_path / "step-00000002"


def test_all_generators_are_restored(tmp_path: Path) -> None:
    def draw() -> tuple[float, float]:
        return float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    model, optimizer = toy()
    update(model, optimizer)
    np.random.standard_normal()  # noqa: NPY002 - leaves a second one in its state
    path = save_checkpoint(tmp_path, 1, model, optimizer, {}, keep_last=2)
    expected = draw()
    draw()
    store.load(path, *toy())
    assert draw() == expected
    # Python's by itself: the checks of types that are on in tests draw from it in every call.
    found, drawn = store.random_state(), []
    for _ in range(2):
        store.restore_random(found)
        drawn.append(random.random())
    assert drawn[0] == drawn[1]


def test_means_of_the_weights_follow_and_are_saved(tmp_path: Path) -> None:
    model, optimizer = toy()
    averages = Ema(model, 0.75)
    expected = model.weight.detach().clone()
    for _ in range(3):
        update(model, optimizer)
        averages.update()
        expected = 0.75 * expected + 0.25 * model.weight.detach()
    torch.testing.assert_close(averages.means["weight"], expected)
    path = save_checkpoint(tmp_path, 3, model, optimizer, {}, keep_last=2, averages=averages)
    other, fresh = toy()
    restored = Ema(other, 0.75)
    store.load(path, other, fresh, restored.means)
    assert torch.equal(restored.means["weight"], averages.means["weight"])
    own = other.weight.detach().clone()
    with restored.applied():
        assert torch.equal(other.weight, averages.means["weight"])
    assert torch.equal(other.weight, own)


def test_pruning_that_is_interrupted_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker goes first: whatever a kill leaves of the folder is an interrupted save."""
    with checkpoints(tmp_path, RunConfig()) as made:
        for step in (1, 2):
            made.save(step, {"step": step}, wait=True)

    def killed(path: Path, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            store.prune(tmp_path, keep_last=1)
    assert list((tmp_path / "step-00000001").iterdir())  # its files are still there
    assert [step for step, _ in store.step_folders(tmp_path)] == [2]
