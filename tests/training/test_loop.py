"""What the loop does beside updates: leaves some out, validates, evaluates, averages, is stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flamingo import FlamingoForConditionalGeneration
from flamingo.errors import UserError
from flamingo.training.config import TrainConfig
from flamingo.training.distributed.fsdp import Processes
from flamingo.training.distributed.interruptions import Stopped
from flamingo.training.optim import NonfiniteUpdates
from tests.eval.worlds import write_scenes
from tests.training.commands import lines
from tests.training.world import config, write_world
from train import train

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def test_updates_that_are_not_finite_are_counted_and_end_at_the_limit(tmp_path: Path) -> None:
    skipped = NonfiniteUpdates(tmp_path, ALONE, limit=2)
    keys = {"a": [["k1", "k2"], ["k3"]]}
    skipped.skip(7, float("nan"), {"a/text": float("inf")}, keys)
    skipped.end_streak()
    skipped.skip(9, float("inf"), {"a/text": 1.0}, keys)
    skipped.skip(10, float("inf"), {"a/text": 1.0}, keys)
    assert skipped.state_dict() == {"total": 3, "in_a_row": 2}
    with pytest.raises(UserError, match=r"update 11: .* no weight was changed \(3 updates in a row\)"):
        skipped.skip(11, float("inf"), {"a/text": 1.0}, keys)
    told = json.loads((tmp_path / "nonfinite-step-00000007-rank-0.json").read_text())
    assert told == {"step": 7, "grad_norm": "nan", "losses": {"a/text": "inf"}, **keys}


def test_a_run_goes_on_over_updates_that_are_not_finite(world: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path, "language", steps=4)
    settings.optim.lr = 1e18
    settings.run.watch.max_nonfinite = 10
    train(settings)
    found = lines(tmp_path)
    assert len(found) == 4
    skips = [int(line["skipped_updates"]) for line in found]
    assert skips[-1] >= 1
    assert len(list(tmp_path.glob("nonfinite-*"))) == skips[-1]
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert all(bool(value.isfinite().all()) for value in weights.values())


def test_validation_leaves_no_trace_and_means_of_weights_are_written(world: Path, tmp_path: Path) -> None:
    plain = config(world, tmp_path / "plain", "flamingo", steps=4)
    train(plain)
    settings = config(world, tmp_path / "with", "flamingo", steps=4, ema=0.5)
    settings.run.validation.every, settings.run.validation.batches = 2, 3
    settings.run.validation.datasets = {
        "held": {"shards": [str(world / "pages")], "batch_size": 4, "max_tokens": 32},
        "pairs": {"shards": [str(world / "pairs")], "batch_size": 2, "kind": "pairs"},
    }
    train(settings)
    with_validation = lines(tmp_path / "with")
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in with_validation] == [line[key] for line in lines(tmp_path / "plain")]
    assert [sorted(key for key in line if key.startswith("validation/")) for line in with_validation] == [
        [],
        ["validation/held", "validation/pairs"],
        [],
        ["validation/held", "validation/pairs"],
    ]
    assert with_validation[3]["validation/held"] < with_validation[1]["validation/held"]
    assert with_validation[0]["norm/resampler"] > 0
    assert with_validation[0]["memory_gib"] > 0.1
    model, mean = (
        dict(FlamingoForConditionalGeneration.from_pretrained(tmp_path / "with" / name).named_parameters())
        for name in ("model", "model-ema")
    )
    changed = {name for name, value in model.items() if not torch.equal(value, mean[name])}
    assert changed
    assert all("resampler" in name or "cross_attn" in name or "new_tokens" in name for name in changed)


def evaluated(world: Path, run_dir: Path, data: Path) -> TrainConfig:
    """A run that validates and evaluates."""
    settings = config(world, run_dir, "flamingo", steps=4)
    settings.run.validation.every, settings.run.validation.batches = 2, 2
    held_out = {"shards": [str(world / "pages")], "batch_size": 4, "max_tokens": 32}
    settings.run.validation.datasets = {"held": held_out}
    settings.run.evaluation.every, settings.run.evaluation.queries = 2, 6
    settings.run.evaluation.tasks, settings.run.evaluation.shots, settings.run.evaluation.data = (
        ["toy_vqa"],
        [0, 2],
        str(data),
    )
    return settings


def test_another_seed_draws_other_weights(world: Path, tmp_path: Path) -> None:
    found = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        settings = config(world, tmp_path / name, "flamingo", steps=1, seed=seed)
        settings.optim.lr = 1e-20
        train(settings)
        found[name] = load_file(tmp_path / name / "model" / "model.safetensors")
    for name, weight in found["one"].items():
        assert torch.equal(weight, found["again"][name]), name
    drawn = {
        name.split(".")[0] for name, weight in found["one"].items() if not torch.equal(weight, found["other"][name])
    }
    assert {"resampler", "cross_attn_blocks", "new_tokens"} <= drawn


def test_the_card_of_a_trained_model_says_what_it_trained_on(world: Path, tmp_path: Path) -> None:
    train(config(world, tmp_path / "run", "flamingo", steps=2, seed=3))
    folder = tmp_path / "run" / "model"
    card = (folder / "README.md").read_text()
    assert "# model\n" in card
    assert "Objective `flamingo`, 2 updates in fp32, seed 3, from the backbones above.\n\n- `pages`, 8 samples" in card
    assert card.index("- `pairs`, 4 samples an update") < card.index("*Fill in: data sets with their licences")
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_few_shot_evaluations_leave_no_trace(world: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "data" / "toy" / "heldout" / "scene_pairs", 208)
    train(config(world, tmp_path / "plain", "flamingo", steps=4))
    train(evaluated(world, tmp_path / "with", tmp_path / "data"))
    found = lines(tmp_path / "with")
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in found] == [line[key] for line in lines(tmp_path / "plain")]
    assert [sorted(key for key in line if key.startswith("evaluation/")) for line in found] == [
        [],
        ["evaluation/toy_vqa/0", "evaluation/toy_vqa/2"],
        [],
        ["evaluation/toy_vqa/0", "evaluation/toy_vqa/2"],
    ]
    settings = evaluated(world, tmp_path / "wrong", tmp_path / "data")
    settings.run.evaluation.tasks = ["toy_vqb"]
    with pytest.raises(UserError, match="task=toy_vqb is not one of coco, "):
        train(settings)


def test_a_wrong_validation_is_named(world: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path, "language")
    settings.run.validation.every = 1
    with pytest.raises(UserError, match=r"run\.validation\.datasets is empty"):
        train(settings)
    settings.run.validation.datasets = {"held": {"shards": ["x"], "batch_size": 2, "max_token": 3}}
    with pytest.raises(UserError, match=r"unknown key run\.validation\.datasets\.held\.max_token: did you mean"):
        train(settings)


def test_wandb_that_is_missing_is_said(world: Path, tmp_path: Path) -> None:
    try:
        import wandb
    except ImportError:
        with pytest.raises(UserError, match=r"run\.wandb=mine needs wandb: pip install 'flamingo-vlm\[wandb\]'"):
            train(config(world, tmp_path, "language", wandb="mine"))
    else:
        os.environ["WANDB_MODE"] = "offline"
        train(config(world, tmp_path, "language", wandb="mine", steps=2))
        assert wandb.__name__ == "wandb"
        assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_signal_between_updates_saves_and_the_rest_is_as_if_nothing_had_been(world: Path, tmp_path: Path) -> None:
    whole = config(world, tmp_path / "whole", "language", steps=40)
    train(whole)
    settings = config(world, tmp_path / "run", "language", steps=40, checkpoint_every=1000)

    def interrupt() -> None:
        while len(lines(tmp_path / "run")) < 3:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Stopped, match="stopped by SIGUSR1, saved in") as caught:
        train(settings)
    thread.join()
    assert caught.value.status == 128 + signal.SIGUSR1
    assert 3 <= len(lines(tmp_path / "run")) < 40
    train(settings)
    assert [line["loss"] for line in lines(tmp_path / "run")] == [line["loss"] for line in lines(tmp_path / "whole")]


def test_the_model_of_an_unfinished_run_is_written_by_fewer_updates(world: Path, tmp_path: Path) -> None:
    train(config(world, tmp_path / "three", "language", steps=3, checkpoint_every=3))
    settings = config(world, tmp_path / "run", "language", steps=5, checkpoint_every=3)
    train(settings)
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000005")  # as if it had been killed before
    settings.run.steps = 3
    train(settings)
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("three", "run"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
