"""What services are told of a run: its config, its name, and that a continuation is the same run."""

from __future__ import annotations

import importlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flamingo.training.metrics import sinks
from tests.training.commands import ROOT, given
from tests.training.world import config, write_world

wandb = pytest.importorskip("wandb", reason="run.wandb is tested where wandb is installed")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def records(folder: Path) -> list[Any]:
    """What wandb has written of one run, offline: LevelDB's log of protobuf records behind a header of 7 bytes."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    (file,) = folder.glob("*.wandb")
    data, at, found, part = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:  # no header is split over two blocks
            at += room
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = messages.Record()
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found


@pytest.mark.slow
def test_wandb_offline_has_the_whole_config_the_name_and_one_id(world: Path, tmp_path: Path) -> None:
    """The real library: everything it writes is below the run folder, and the second start goes on under its id."""
    run, home = tmp_path / "mine", tmp_path / "home"
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"WANDB_MODE": "offline", "HOME": str(home), "TMPDIR": str(home)}
    for steps in (1, 2):
        settings = given(config(world, run, "flamingo", steps=steps, wandb="project"), tmp_path)
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *settings],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    written = {str(path.relative_to(home)) for path in home.rglob("*") if "wandb" in str(path.relative_to(home))}
    assert not written
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    found = [records(folder) for folder in folders]
    begun = [next(record.run for record in part if record.HasField("run")) for part in found]
    assert {(one.run_id, one.display_name, one.project) for one in begun} == {
        ((run / "wandb-id.txt").read_text(), "mine", "project")
    }
    told = {item.key: json.loads(item.value_json) for item in begun[1].config.update}
    assert told["run"]["steps"] == 2
    assert told["optim"]["lr"] == 3e-3
    assert told["data"]["datasets"]["pages"]["batch_size"] == 8
    logged = [record.history.step.num for part in found for record in part if record.HasField("history")]
    assert logged == [1, 2]


def test_tensorboard_shows_the_config(world: Path, tmp_path: Path) -> None:
    accumulator: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    described = config(world, tmp_path / "run", "flamingo")
    described.run.tensorboard = True
    sinks.MetricSinks(tmp_path, described, start=0, is_main=True).close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("config/text_summary")
    assert b"lr: 0.003" in text.tensor_proto.string_val[0]
    assert b"max_tokens: 32" in text.tensor_proto.string_val[0]


def test_other_processes_tell_nobody(world: Path, tmp_path: Path) -> None:
    described = config(world, tmp_path / "run", "flamingo", wandb="project")
    reports = sinks.MetricSinks(tmp_path, described, start=0, is_main=False)
    reports.log(1, {"loss": 1.0})
    reports.close()
    assert not list(tmp_path.iterdir())


def test_names_of_jobs_of_a_sweep_differ() -> None:
    assert sinks.run_name(Path("runs/mine")) == "mine"
    assert sinks.run_name(Path("runs/mine/run.seed=1")) == "mine/run.seed=1"
