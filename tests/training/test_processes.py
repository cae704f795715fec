"""Real processes: two with gloo against one, under torchrun and without, and a kill in the middle of a run."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from flamingo.training.config import TrainConfig
from tests.training.commands import ROOT, begin, given, lines, torchrun, train_on
from tests.training.world import config, write_world

pytestmark = pytest.mark.slow
TWO = torchrun("--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def run(settings: TrainConfig, tmp_path: Path, processes: int = 1) -> list[dict[str, float]]:
    """Run the command."""
    launcher = [sys.executable, str(ROOT / "train.py")] if processes == 1 else TWO
    log = tmp_path / "log"
    assert begin([*launcher, *given(settings, tmp_path)], log).wait(280) == 0, log.read_text()[-3000:]
    return lines(Path(settings.run.dir))


@pytest.mark.parametrize("objective", ["align", "contrastive", "language", "flamingo"])
def test_two_processes_are_one(world: Path, tmp_path: Path, objective: str) -> None:
    one, two = (train_on(size, config(world, tmp_path / str(size), objective, steps=4)) for size in (1, 2))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=2e-4, abs=2e-5)


def test_two_processes_of_which_one_has_no_image(world: Path, tmp_path: Path) -> None:
    """With a batch of 2 documents, of which every third has no image, a process is often without any."""
    settings = [config(world, tmp_path / name, "flamingo", steps=6) for name in ("one", "two")]
    for setting in settings:
        setting.data.datasets = {"pages": {"shards": [str(world / "pages")], "batch_size": 2, "max_tokens": 32}}
    one, two = run(settings[0], tmp_path), run(settings[1], tmp_path, processes=2)
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=2e-4)


def test_resumed_on_another_number_of_processes(world: Path, tmp_path: Path) -> None:
    whole = train_on(1, config(world, tmp_path / "whole", "flamingo", steps=6))
    train_on(2, config(world, tmp_path / "parts", "flamingo", steps=2))
    parts = train_on(1, config(world, tmp_path / "parts", "flamingo", steps=6))
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in whole], rel=2e-4)


def test_killed_and_resumed_is_uninterrupted_bit_for_bit(world: Path, tmp_path: Path) -> None:
    whole = train_on(1, config(world, tmp_path / "whole", "flamingo", steps=60, checkpoint_every=5))
    settings = config(world, tmp_path / "killed", "flamingo", steps=60, checkpoint_every=5)
    for target in (12, 37):
        process = begin([sys.executable, str(ROOT / "train.py"), *given(settings, tmp_path)], tmp_path / "log")
        deadline = time.monotonic() + 120
        while len(lines(tmp_path / "killed")) < target and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it was killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    resumed = run(settings, tmp_path)
    assert [line["step"] for line in resumed] == list(range(1, 61))
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
