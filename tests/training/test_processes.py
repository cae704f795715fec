"""Real processes: two under torchrun with gloo against one, and a kill in the middle of a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from flamingo.training.config import TrainConfig
from tests.training.world import config, write_world

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def command(settings: TrainConfig, tmp_path: Path, processes: int = 1) -> list[str]:
    """The command line that runs exactly these settings, through a YAML of its own."""
    where = tmp_path / f"settings-{processes}-{Path(settings.run.dir).name}"
    (where / "experiment").mkdir(parents=True, exist_ok=True)
    body = yaml.safe_dump(json.loads(json.dumps(settings.as_dict())))
    (where / "experiment" / "given.yaml").write_text(f"# @package _global_\n{body}")
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, str(ROOT / "train.py"), f"hydra.searchpath=[file://{where}]", "experiment=given"]


def run(settings: TrainConfig, tmp_path: Path, processes: int = 1) -> list[dict[str, float]]:
    done = subprocess.run(
        command(settings, tmp_path, processes), capture_output=True, text=True, cwd=tmp_path, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(Path(settings.run.dir))


def metrics(run_dir: Path) -> list[dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("objective", ["align", "contrastive", "language", "flamingo"])
def test_two_processes_are_one(world: Path, tmp_path: Path, objective: str) -> None:
    one = run(config(world, tmp_path / "one", objective, steps=4), tmp_path)
    two = run(config(world, tmp_path / "two", objective, steps=4), tmp_path, processes=2)
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
    whole = run(config(world, tmp_path / "whole", "flamingo", steps=6), tmp_path)
    run(config(world, tmp_path / "parts", "flamingo", steps=2), tmp_path, processes=2)
    parts = run(config(world, tmp_path / "parts", "flamingo", steps=6), tmp_path)
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in whole], rel=2e-4)


def test_killed_and_resumed_is_uninterrupted_bit_for_bit(world: Path, tmp_path: Path) -> None:
    whole = run(config(world, tmp_path / "whole", "flamingo", steps=60, checkpoint_every=5), tmp_path)
    settings = config(world, tmp_path / "killed", "flamingo", steps=60, checkpoint_every=5)
    for target in (12, 37):
        process = subprocess.Popen(
            command(settings, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while len(metrics_so_far(tmp_path / "killed")) < target and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it was killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    resumed = run(settings, tmp_path)
    assert [line["step"] for line in resumed] == list(range(1, 61))
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]


def metrics_so_far(run_dir: Path) -> list[str]:
    path = run_dir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []
