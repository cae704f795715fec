"""Several runs from one command, and what its quoting says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flamingo.errors import UserError
from flamingo.training.compose import compose, job_folder, quoted
from tests.training.commands import ROOT, given
from tests.training.world import config, write_world

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run train.py as a user does who is in another folder than the checkout."""
    (folder / "here").mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder / "here", capture_output=True, text=True, env=environment)


def runs(folder: Path) -> dict[str, dict[str, object]]:
    """Folder of each run below `folder` to its config's table `run`."""
    found = folder.rglob("config.yaml")
    return {
        str(path.parent.relative_to(folder)): yaml.safe_load(path.read_text())["run"]
        for path in found
        if (path.parent / "metrics.jsonl").exists()
    }


@pytest.mark.slow
def test_each_job_has_a_folder_of_its_own_and_resumes_there(world: Path, tmp_path: Path) -> None:
    settings = given(config(world, tmp_path / "run", "flamingo", steps=1, parallel="fsdp", tensorboard=True), tmp_path)
    done = start(tmp_path, "-m", *settings, "run.seed=0,1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    found = runs(tmp_path / "run")
    assert {name: run["seed"] for name, run in found.items()} == {"run.seed=0": 0, "run.seed=1": 1}
    for name in found:
        assert (tmp_path / "run" / name / "model" / "config.json").exists()
    assert not list((tmp_path / "here").iterdir())  # no multirun/, no outputs/
    again = start(tmp_path, "-m", *settings, "run.seed=0,1", "run.steps=2")
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("resumed") == 2


@pytest.mark.slow
def test_a_sweep_over_folders_and_a_job_that_is_wrong(world: Path, tmp_path: Path) -> None:
    settings = given(config(world, tmp_path / "unused", "language", steps=1), tmp_path)
    folders = f"run.dir={tmp_path}/sweep/a,{tmp_path}/sweep/b"
    done = start(tmp_path, "-m", *settings, folders, "optim.lr=1e-3,-1")
    assert done.returncode == 2
    assert "error: optim.lr=-1 must be above 0" in done.stderr
    assert "Traceback" not in done.stderr
    assert set(runs(tmp_path / "sweep")) == {"a", "b"}  # the jobs that are right have run
    assert not (tmp_path / "unused").exists()
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.slow
def test_an_override_means_the_same_with_and_without_m(world: Path, tmp_path: Path) -> None:
    """A dataset that no file mentions; submitted from another folder than the checkout."""
    added = [f"data.datasets.more.shards=[{world / 'words'}]", "data.datasets.more.batch_size=4"]
    for name, extra in (("plain", []), ("m", ["-m"]), ("sub", ["-m", "launch=local", "launch.processes=1"])):
        settings = given(config(world, tmp_path / name, "flamingo", steps=1), tmp_path)
        done = start(tmp_path, *extra, *settings, *added)
        assert done.returncode == 0, done.stderr[-3000:]
        described = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        assert described["data"]["datasets"]["more"]["batch_size"] == 4
    assert not list((tmp_path / "here").iterdir())


def test_folders_of_jobs() -> None:
    assert job_folder("runs/x", []) == "runs/x"
    assert job_folder("runs/x", ["++run.seed=1"]) == "runs/x/run.seed=1"
    assert job_folder("runs/x", ["experiment=demo", "optim.lr=1e-4"]) == "runs/x/experiment=demo,optim.lr=1e-4"
    assert job_folder("runs/b", ["run.seed=1", "run.dir=runs/b"]) == "runs/b"
    # Values that a file name cannot have, or that only differ there, never share a folder.
    names = {job_folder("runs/x", [f"model.language.name={name}"]) for name in ("a/b", "a_b", "a b", "c" * 300)}
    assert len(names) == 4
    assert all(Path(name).parent == Path("runs/x") and len(Path(name).name) < 200 for name in names)


@pytest.mark.parametrize("folder", ["runs/a b", "runs/it's", "runs/{x}", "a=b,c", "back\\slash"])
def test_a_quoted_folder_is_read_as_it_is(folder: str) -> None:
    assert compose([f"run.dir={quoted(folder)}"]).run.dir == folder


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("run.dir=runs/{name}", "a text with braces stands in quotes inside those of the shell"),
        ("data.datasets.a.shards=[a-{000..010}.tar]", """'data.datasets.a.shards=["a-{000..010}.tar"]'"""),
        ("run.dir=a:b:[", """with the value in quotes inside those of the shell, as in 'run.dir="..."'"""),
    ],
)
def test_a_value_that_cannot_be_read_says_how_to_quote_it(argument: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        compose([argument])
    assert f"{argument!r} cannot be read: write key=value" in str(caught.value)
    assert hint in str(caught.value)
    fixed = compose(['data.datasets.a.shards=["a-{000..010}.tar"]', "data.datasets.a.batch_size=1"])
    assert fixed.data.datasets["a"]["shards"] == ["a-{000..010}.tar"]
