"""The engine of train.py on real shards: equalities, resume, refusals. Several processes: test_processes.py."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.errors import UserError
from tests.training.commands import losses
from tests.training.world import config, write_world
from train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("objective", ["contrastive", "language", "flamingo"])
def test_objective_learns_and_writes_a_whole_run_folder(world: Path, tmp_path: Path, objective: str) -> None:
    settings = config(world, tmp_path, objective, steps=30, checkpoint_every=30)
    if objective == "flamingo":
        settings.optim.lr_factors.gates = 20.0
        settings.model.freeze.language = "train"
    train(settings)
    curve = losses(tmp_path)
    assert len(curve) == 30
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"config.yaml", "metrics.jsonl", "checkpoints", "model", "loss.png"}
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_s", "images_per_s", "data_wait"} <= set(line)


def test_exports_are_read_by_the_libraries_they_belong_to(world: Path, tmp_path: Path) -> None:
    for objective in ("contrastive", "language", "flamingo"):
        train(config(world, tmp_path / objective, objective, steps=1))
    clip = open_clip.create_model(f"local-dir:{tmp_path / 'contrastive' / 'model'}")
    assert clip.logit_scale.ndim == 0
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "language" / "model")
    assert lm.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "language" / "model"))
    folder = tmp_path / "flamingo" / "model"
    model = FlamingoForConditionalGeneration.from_pretrained(folder)
    processor = FlamingoProcessor.from_pretrained(folder)
    out = model.generate(**processor(text=["a big"], images=[[]]), max_new_tokens=2)
    assert out.shape[0] == 1


def test_backbones_stay_frozen(world: Path, tmp_path: Path) -> None:
    train(config(world, tmp_path / "a", "flamingo", steps=1, seed=3))
    train(config(world, tmp_path / "b", "flamingo", steps=4, seed=3))
    one, four = (FlamingoForConditionalGeneration.from_pretrained(tmp_path / name / "model") for name in "ab")
    after = dict(four.named_parameters())
    changed = {one.part_of(name) for name, value in one.named_parameters() if not torch.equal(value, after[name])}
    assert changed == {"resampler", "cross_attention", "new_tokens"}


def test_micro_batches_accumulate_to_the_whole_batch(world: Path, tmp_path: Path) -> None:
    for name, micro_batches in (("whole", 1), ("parts", 4)):
        train(config(world, tmp_path / name, "flamingo", micro_batches=micro_batches))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=2e-6)
    assert losses(tmp_path / "parts", "grad_norm") == pytest.approx(losses(tmp_path / "whole", "grad_norm"), rel=1e-4)


def test_fsdp_on_one_process_is_exact(world: Path, tmp_path: Path) -> None:
    for name in ("none", "fsdp"):
        train(config(world, tmp_path / name, "flamingo", parallel=name))
    assert losses(tmp_path / "fsdp") == losses(tmp_path / "none")


@pytest.mark.parametrize("objective", ["contrastive", "language", "flamingo"])
def test_resumed_is_uninterrupted_bit_for_bit(world: Path, tmp_path: Path, objective: str) -> None:
    train(config(world, tmp_path / "whole", objective, steps=5))
    train(config(world, tmp_path / "parts", objective, steps=2))
    train(config(world, tmp_path / "parts", objective, steps=5))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert losses(tmp_path / "parts", "grad_norm") == losses(tmp_path / "whole", "grad_norm")


def test_a_folder_of_another_run_is_refused_and_can_be_restarted(world: Path, tmp_path: Path) -> None:
    train(config(world, tmp_path, "language", steps=1))
    other = config(world, tmp_path, "language", steps=1)
    other.optim.lr = 1.0
    with pytest.raises(UserError, match=r"holds a run with another config: optim\.lr \(0\.003 -> 1\.0\)"):
        train(other)
    other.run.resume = "never"
    train(other)
    assert len(losses(tmp_path)) == 1


def test_a_checkpoint_of_another_language_model_is_refused(world: Path, tmp_path: Path) -> None:
    train(config(world, tmp_path / "lm", "language", steps=1))
    settings = config(world, tmp_path / "run", "flamingo", steps=1)
    settings.model.language.name = str(tmp_path / "lm" / "model")
    train(settings)
    train(config(world, tmp_path / "lm", "language", steps=2))  # the folder's weights are now others
    settings.run.steps = 2
    with pytest.raises(UserError, match="belongs to another language model"):
        train(settings)


def test_the_tokenizer_of_another_language_model_is_refused(world: Path, tmp_path: Path) -> None:
    train(config(world, tmp_path / "lm", "language", steps=1))
    larger = AutoTokenizer.from_pretrained(str(world / "tokenizer"))
    larger.add_tokens(["<more>"])
    larger.save_pretrained(str(tmp_path / "other"))
    settings = config(world, tmp_path / "run", "language", steps=1)
    settings.model.language.name = str(tmp_path / "lm" / "model")
    settings.model.language.tokenizer = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"other has \d+ tokens, more than the \d+ embeddings of .*model: set model\."):
        train(settings)


def test_a_gradient_that_is_not_finite_changes_no_weight(world: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path, "language", steps=5, checkpoint_every=1)
    settings.optim.lr = 1e18
    with pytest.raises(UserError, match=r"update \d+: the gradient is not finite, and no weight was changed"):
        train(settings)
    (keys,) = tmp_path.glob("nonfinite-step-*.json")
    assert json.loads(keys.read_text())["words"][0][0].startswith("words-")


def test_missing_shards_stop_before_anything_trains(world: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path, "language")
    settings.data.datasets["words"]["shards"] = [str(tmp_path / "nowhere.tar")]
    with pytest.raises(UserError, match=r"nowhere\.tar does not exist"):
        train(settings)
    assert not (tmp_path / "checkpoints").exists()


def test_everything_wrong_is_said_at_once_before_anything_loads(world: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path, "flamingo", micro_batches=3, parallel="none", precision="bf16")
    settings.model.language.name = str(tmp_path / "no-such-model")
    settings.data.datasets["pages"]["shards"] = [str(tmp_path / "nowhere.tar")]
    settings.data.datasets["pairs"]["hue"] = "red"
    with pytest.raises(UserError) as caught:
        train(settings)
    for expected in (
        "data.datasets.pages.batch_size=8 is not divisible by processes x run.micro_batches = 1 x 3",
        "run.parallel=none cannot compute in bf16",
        "unknown key data.datasets.pairs.hue",
        "nowhere.tar does not exist",
    ):
        assert expected in str(caught.value)
    assert "no-such-model" not in str(caught.value)  # it was not looked for yet
    assert list(tmp_path.iterdir()) == []


def test_fewer_samples_than_micro_batches_are_refused(world: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path, "language", micro_batches=40)
    settings.data.datasets["words"]["batch_size"] = 40
    with pytest.raises(UserError, match=r"words\.shards hold 32 samples, fewer than processes x .* = 40"):
        train(settings)


def test_a_tokenizer_is_trained_where_none_is_named(world: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path, "language", steps=1)
    settings.model.language.tokenizer = None
    settings.model.language.vocab_size = 300
    train(settings)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer) <= 300
    assert tokenizer.decode(tokenizer("a red circle")["input_ids"]) == "a red circle"
