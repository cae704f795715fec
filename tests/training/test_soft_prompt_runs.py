"""`model.soft_prompt`: a run that trains vectors in front of the rows, and nothing else unless it is told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor, UserError
from flamingo.soft_prompts import SOFT_PROMPT_FILE, load_soft_prompt
from flamingo.training.config import TrainConfig
from flamingo.training.model_config import FreezePolicy
from flamingo.training.objectives import flamingo as objective
from tests.training.commands import losses, on_one_and_two_processes
from tests.training.world import config, write_world
from train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("world"))
    train(config(root, root / "start", "flamingo", steps=2))
    return root


def run_of(world: Path, run_dir: Path, **run: Any) -> TrainConfig:
    """A run from the start's model in which only six vectors train."""
    settings = config(world, run_dir, "flamingo", **run)
    settings.model.init = str(world / "start" / "model")
    settings.model.vision.config = settings.model.language.config = settings.model.language.tokenizer = None
    settings.model.freeze = FreezePolicy(resampler="frozen", cross_attention="frozen", new_tokens="frozen")
    settings.model.soft_prompt.tokens = 6
    settings.optim.lr = 0.1
    return settings


def test_only_the_vectors_change_and_the_model_that_is_written_has_them(world: Path, tmp_path: Path) -> None:
    train(run_of(world, tmp_path / "run", steps=12))
    seen = losses(tmp_path / "run")
    assert sum(seen[-3:]) < sum(seen[:3])
    folders = (world / "start" / "model", tmp_path / "run" / "model")
    start, tuned = (FlamingoForConditionalGeneration.from_pretrained(folder) for folder in folders)
    weights = tuned.state_dict()
    assert weights.pop("new_tokens.soft.rows").shape == (6, 32)
    assert weights.keys() == start.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in start.state_dict().items())
    processor = FlamingoProcessor.from_pretrained(tmp_path / "run" / "model")
    inputs = processor(text="a red")
    assert inputs["input_ids"].shape[1] > 6
    file = tmp_path / "run" / "model" / SOFT_PROMPT_FILE
    assert file.stat().st_size < 4096
    plain = FlamingoProcessor.from_pretrained(world / "start" / "model")
    load_soft_prompt(start, plain, file)
    assert torch.equal(start(**plain(text="a red")).logits, tuned(**inputs).logits)
    with torch.no_grad():
        start.resampler.latents.add_(1)
    with pytest.raises(UserError, match="another model"):
        load_soft_prompt(start, plain, file)


def test_it_resumes_bit_for_bit_packed_or_not(world: Path, tmp_path: Path) -> None:
    for pack in (0, 64):
        for name, ends in (("whole", (4,)), ("parts", (2, 4))):
            for steps in ends:
                settings = run_of(world, tmp_path / f"{name}-{pack}", steps=steps, ema=0.9)
                settings.data.datasets["pages"]["pack"] = pack
                train(settings)
        assert losses(tmp_path / f"parts-{pack}") == losses(tmp_path / f"whole-{pack}")
    assert losses(tmp_path / "whole-64") == pytest.approx(losses(tmp_path / "whole-0"), abs=1e-4)


def test_beside_adapters_the_file_belongs_to_the_merged_model(world: Path, tmp_path: Path) -> None:
    settings = run_of(world, tmp_path / "run", steps=3)
    settings.model.freeze.language = "lora"
    settings.model.soft_prompt.tokens, settings.model.soft_prompt.text = 0, "a red square"
    train(settings)
    model = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    processor = FlamingoProcessor.from_pretrained(tmp_path / "run" / "model")
    assert len(processor.soft_prompts["default"]) == 3
    load_soft_prompt(model, processor, tmp_path / "run" / "model" / SOFT_PROMPT_FILE, "again")


def test_what_cannot_be_is_refused_in_a_sentence(world: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path, "language")
    settings.model.soft_prompt.tokens = 4
    assert "model.soft_prompt is for objective flamingo, not language: remove it" in settings.problems()
    settings = run_of(world, tmp_path)
    settings.model.soft_prompt.tokens = 101
    assert any("model.soft_prompt.tokens" in problem for problem in settings.problems())
    settings.model.soft_prompt.tokens = 0
    assert any("leaves nothing to train" in problem for problem in settings.problems())
    train(run_of(world, tmp_path / "first", steps=1))
    settings = run_of(world, tmp_path / "second", steps=1)
    settings.model.init = str(tmp_path / "first" / "model")
    with pytest.raises(UserError, match="has a soft prompt already: to train it on, leave model"):
        train(settings)
    settings = run_of(world, tmp_path / "third", steps=1)
    settings.data.datasets["pages"]["max_tokens"] = 7
    with pytest.raises(UserError, match=r"pages\.max_tokens=7 leaves no room behind the soft prompt of 6 vectors"):
        train(settings)


def test_one_that_a_model_has_is_trained_on(world: Path, tmp_path: Path) -> None:
    train(run_of(world, tmp_path / "first", steps=1))
    settings = run_of(world, tmp_path / "second", steps=2)
    settings.model.init = str(tmp_path / "first" / "model")
    settings.model.soft_prompt.tokens = 0
    settings.model.freeze.new_tokens = "train"
    train(settings)
    first, second = (
        FlamingoForConditionalGeneration.from_pretrained(tmp_path / name / "model") for name in ("first", "second")
    )
    assert not torch.equal(first.new_tokens.soft.rows, second.new_tokens.soft.rows)


def test_a_plan_counts_it(world: Path, tmp_path: Path) -> None:
    settings = run_of(world, tmp_path)
    meta, _ = objective.build_on_meta(settings.model, 1)
    assert [name for name, weight in meta.named_parameters() if weight.requires_grad] == ["new_tokens.soft.rows"]
    settings.plan = True
    train(settings)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_two_processes_train_what_one_does(world: Path, tmp_path: Path) -> None:
    one, two = on_one_and_two_processes(lambda folder: run_of(world, folder, steps=3), tmp_path)
    assert two == pytest.approx(one, abs=1e-5)
