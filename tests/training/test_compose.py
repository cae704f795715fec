"""Every YAML composes into a valid typed config, and a wrong argument is named in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.dataset import dataset_specs
from flamingo.configs.validate import refuse
from flamingo.errors import UserError
from flamingo.training.compose import compose
from flamingo.training.stages import stages_of
from train import checked

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "hydra" / "experiment").glob("*.yaml"))


def check(arguments: list[str]) -> None:
    """What train.py does with its arguments before anything is loaded."""
    refuse(checked(compose(arguments, check=lambda config: checked(config)[1]))[1])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_valid(name: str) -> None:
    stages, problems = stages_of(compose([f"experiment={name}"]))
    assert problems == []
    for config in (stage.planned for stage in stages):
        problems = config.problems()
        assert len(dataset_specs("data", config.data.datasets, problems)) == len(config.data.datasets) > 0
        assert problems == []


@pytest.mark.parametrize("group", ["model", "data", "optim", "run"])
def test_every_group_file_composes(group: str) -> None:
    for path in (ROOT / "hydra" / group).glob("*.yaml"):
        compose([f"{group}={path.stem}"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run.stepz=3"], "unknown key run.stepz: did you mean run.steps?"),
        (["run.steps=many"], "run.steps=many must be a whole number"),
        (["experiment=demo", "model=null"], "train.yaml cannot be composed: Config group override must be a string"),
        (["experiment=nope"], "experiment=nope is not one of demo, "),
        (
            ["experiment=demo", "data.datasets.binding.batchsize=3"],
            "unknown key data.datasets.binding.batchsize: did you mean data.datasets.binding.batch_size?",
        ),
        (["run.steps"], "'run.steps' cannot be read: write key=value"),
        (["+foo=3"], "unknown key foo"),
        (["model.freeze.vision=half"], "model.freeze.vision=half is not one of frozen, train"),
        (["optim=sgd"], "optim=sgd is not one of adamw, demo, finetune"),
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
        env={**os.environ, "DEMO": str(tmp_path / "demo")},  # a checkout may have made its demo already
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    # All at once: the demo's shards are not there either.
    assert done.stderr.startswith("error: optim.schedule=linear is not one of constant, cosine; dataset ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_one_seed_is_for_weights_and_order_alike() -> None:
    for arguments, expected in ((["run.seed=5"], (5, 5)), (["run.seed=5", "data.seed=2"], (5, 2)), ([], (0, 0))):
        config = compose(["experiment=real", *arguments], lambda config: [])
        assert [(s.config.run.seed, s.config.data.seed) for s in stages_of(config)[0]] == [expected] * 2


@pytest.mark.parametrize("arguments", [["experiment=demo", "--cfg", "job"], ["--cfg", "job", "experiment=demo"]])
def test_the_config_is_printed_wherever_it_is_asked_for(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "experiment" not in done.stdout
    assert "\nobjective: flamingo\n" in done.stdout


def test_the_config_of_a_sweep_is_refused_in_a_line() -> None:
    arguments = ["-m", "experiment=demo", "run.seed=1,2", "--cfg", "job"]
    done = subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr == "error: -m and --cfg (or --info) do not go together: leave out -m to see the config of one run\n"
    )


def test_all_mistakes_are_named_in_one_go() -> None:
    arguments = ["experiment=nope", "run.stepz=3", "run.steps=many", "run.log_every=true", "optim.schedule=linear"]
    arguments += ["run.ema=1", "~run.seed", "model.resampler.depth=0", "data.datasets.a.batch_size=0"]
    arguments += ["data.datasets.a.hue=1", "optim.lr=${nothing}", "run.micro_batches=2", "objective=contrastive"]
    with pytest.raises(UserError) as caught:
        check(arguments)
    for expected in (
        "experiment=nope is not one of demo, ",
        "~run.seed: write key=value",
        "optim.lr: Interpolation key 'nothing' not found",
        "unknown key run.stepz: did you mean run.steps?",
        "run.steps=many must be a whole number",
        "run.log_every=true must be a number",
        "optim.schedule=linear is not one of constant, cosine",
        "run.ema=1 must be below 1",
        "model.resampler.depth=0 must be at least 1",
        "data.datasets.a.batch_size=0 must be at least 1",
        "data.datasets.a.shards is missing: name at least one tar, folder or pattern",
        "unknown key data.datasets.a.hue",
        "run.micro_batches must be 1 for objective contrastive",
    ):
        assert expected in str(caught.value)
