"""Every YAML composes into a valid typed config, and a wrong argument is named in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flamingo.errors import UserError
from flamingo.training.compose import compose
from train import dataset_specs

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "hydra" / "experiment").glob("*.yaml"))


def check(arguments: list[str]) -> None:
    """What train.py does with its arguments before anything is loaded."""
    config = compose(arguments)
    wrong = config.problems()
    dataset_specs("data", config.data.datasets, wrong)
    raise UserError("; ".join(wrong))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_valid(name: str) -> None:
    config = compose([f"experiment={name}"])
    wrong = config.problems()
    assert len(dataset_specs("data", config.data.datasets, wrong)) == len(config.data.datasets)
    assert wrong == []


@pytest.mark.parametrize("group", ["model", "data", "optim", "run"])
def test_every_group_file_composes(group: str) -> None:
    for path in (ROOT / "hydra" / group).glob("*.yaml"):
        compose([f"{group}={path.stem}"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run.stepz=3"], "run.stepz is not a key of the config: did you mean run.steps?"),
        (["run.steps=many"], "run.steps=many is not of type"),
        (["experiment=nope"], "experiment/nope"),
        (["experiment=demo", "data.datasets.binding.batchsize=3"], "data.datasets.binding.batchsize"),
        (["run.steps"], "run.steps"),
        (["+foo=3"], "foo is not a key of the config"),
        (["model.freeze.vision=half"], "model.freeze.vision=half is not one of frozen, train"),
        (["optim=sgd"], "optim/sgd"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        check(arguments)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message


def test_command_line_prints_one_line_and_exits_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "train.py", "experiment=demo", "optim.schedule=linear", f"run.dir={tmp_path}/run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    # All at once: the demo's shards are not there either.
    assert done.stderr.startswith("error: optim.schedule=linear is not one of constant, cosine; dataset ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
