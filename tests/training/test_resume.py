"""What changes nothing of the result is no other run, and what does is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from data.dataset import DatasetSpec
from flamingo.errors import UserError
from flamingo.training import optim
from flamingo.training.config import DEFAULT_MAX_TOKENS, OptimConfig, TrainConfig
from flamingo.training.model_config import LanguageSource
from tests.training.commands import losses
from tests.training.world import LLAMA, config, swap_words, write_world
from train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def with_vision(settings: TrainConfig) -> TrainConfig:
    settings.model.freeze.vision = "train"
    return settings


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # the encoder gives a view; nothing changes it in place
@pytest.mark.parametrize("parallel", ["none", "fsdp"])
def test_a_trained_weight_without_a_gradient_resumes_bit_for_bit(world: Path, tmp_path: Path, parallel: str) -> None:
    """The encoder's last norm and projection lie behind the tokens that are taken."""
    train(with_vision(config(world, tmp_path / "whole", "flamingo", steps=4, parallel=parallel)))
    train(with_vision(config(world, tmp_path / "parts", "flamingo", steps=2, parallel=parallel)))
    train(with_vision(config(world, tmp_path / "parts", "flamingo", steps=4, parallel=parallel)))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_state_from_the_start_changes_no_update() -> None:
    found = []
    for build in (
        lambda weights: optim.adamw([{"params": weights}], betas=(0.9, 0.95), eps=1e-8),
        lambda weights: torch.optim.AdamW(weights, betas=(0.9, 0.95), eps=1e-8, fused=True),
    ):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
        optimizer = build(weights)
        for step in range(3):
            weights[0].grad = torch.full((3, 4), 0.5 + step)
            weights[1].grad = torch.ones(3, 4) if step else None  # its first gradient comes later
            optimizer.step()
        found.append([weight.detach().clone() for weight in weights])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_saves_memory_goes_on(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(world, tmp_path / "whole", "flamingo", steps=4))
    run = tmp_path / "parts"
    train(config(world, run, "flamingo", steps=2))
    train(config(world, run, "flamingo", steps=3, activation_checkpointing=True))
    assert "run.micro_batches" not in capsys.readouterr().out
    train(config(world, run, "flamingo", steps=4, micro_batches=2, activation_checkpointing=True))
    assert "run.micro_batches 1 -> 2: the same batches, their gradients summed in another" in capsys.readouterr().out
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), abs=2e-6)


def test_moved_folders_go_on_and_other_content_is_refused(world: Path, tmp_path: Path) -> None:
    moved, run = tmp_path / "moved", tmp_path / "run"
    shutil.copytree(world, moved)
    train(config(world, run, "flamingo", steps=2))
    train(config(moved, run, "flamingo", steps=3))
    described = (run / "config.yaml").read_text()
    assert str(moved) in described
    # Another tokenizer of the same size: ids mean other words.
    swap_words(moved / "tokenizer")
    assert len(AutoTokenizer.from_pretrained(str(moved / "tokenizer")))
    with pytest.raises(UserError, match="belongs to another tokenizer"):
        train(config(moved, run, "flamingo", steps=4))
    assert (run / "config.yaml").read_text() == described  # a refused start leaves no trace
    # Other documents behind the same names.
    other = config(world, run, "flamingo", steps=4)
    other.data.datasets["pages"]["shards"] = [str(world / "words")]
    with pytest.raises(UserError, match="dataset 'pages' differs from the saved state"):
        train(other)
    train(config(world, run, "flamingo", steps=4))


def test_a_moved_model_goes_on_and_another_is_refused(world: Path, tmp_path: Path) -> None:
    """Also where the part that differs is frozen and neither encoder nor LM."""
    train(config(world, tmp_path / "start", "flamingo", steps=1))
    start = tmp_path / "start" / "model"
    shutil.copytree(start, tmp_path / "copy")

    def continued(init: Path, steps: int) -> TrainConfig:
        settings = config(world, tmp_path / "run", "flamingo", steps=steps)
        settings.model.init, settings.model.freeze.resampler = str(init), "frozen"
        settings.model.vision.config = settings.model.language.config = settings.model.language.tokenizer = None
        return settings

    train(continued(start, 1))
    train(continued(tmp_path / "copy", 2))
    settings = config(world, tmp_path / "start", "flamingo", steps=2)
    train(settings)  # the folder's resampler is now another
    with pytest.raises(UserError, match="belongs to another resampler"):
        train(continued(start, 3))


def test_another_shape_of_a_trained_backbone_is_refused(world: Path, tmp_path: Path) -> None:
    for name, width in (("lm", 64), ("wider", 96)):
        settings = config(world, tmp_path / name, "language", steps=1)
        settings.model.language = LanguageSource(
            config={**LLAMA, "intermediate_size": width}, tokenizer=str(world / "tokenizer")
        )
        train(settings)
    run = config(world, tmp_path / "run", "language", steps=1)
    run.model.language = LanguageSource(name=str(tmp_path / "lm" / "model"))
    train(run)
    run.run.steps = 2
    run.model.language = LanguageSource(name=str(tmp_path / "wider" / "model"))
    with pytest.raises(UserError, match=r"have \S*mlp\S* in different shapes"):
        train(run)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schedule": "cosine"}, "run.steps 2 -> 4 changes the cosine schedule: the learning rate of update 3 is"),
        ({"schedule": "cosine", "warmup_steps": 3}, ""),  # still warming up, whatever the length
        ({"schedule": "constant", "warmup_steps": 1}, ""),
    ],
)
def test_another_length_says_what_it_does_to_the_rate(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], said: str
) -> None:
    for steps in (2, 4):
        settings = config(world, tmp_path, "language", steps=steps)
        settings.optim = OptimConfig(lr=1e-3, **options)
        capsys.readouterr()
        train(settings)
    printed = capsys.readouterr().out
    assert (said in printed) if said else ("changes the" not in printed)
    if said:
        assert "update 3 is 0.0005 where it was 0" in printed


def test_what_changes_the_result_is_refused(world: Path, tmp_path: Path) -> None:
    train(config(world, tmp_path, "language", steps=1))
    for key, change in (("seed", {"seed": 1}), ("ema", {"ema": 0.5})):
        with pytest.raises(UserError, match=rf"holds a run with another config: run\.{key}"):
            train(config(world, tmp_path, "language", steps=2, **change))
    longer = config(world, tmp_path, "language", steps=2)
    longer.data.datasets["words"]["max_tokens"] = 16
    with pytest.raises(UserError, match=r"data\.datasets\.words\.max_tokens \(32 -> 16\)"):
        train(longer)


# What the config alone can tell, before a weight loads.


def test_nothing_to_train_and_rows_that_are_too_long_are_named_together(world: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path, "flamingo")
    for part in ("resampler", "cross_attention", "new_tokens"):
        setattr(settings.model.freeze, part, "frozen")
    settings.data.datasets["pages"]["max_tokens"] = 129
    settings.run.validation.every, settings.run.validation.datasets = 1, {"held": dict(settings.data.datasets["pages"])}
    with pytest.raises(UserError) as caught:
        train(settings)
    for expected in (
        "model.freeze leaves nothing to train: set one of vision, language,",
        "data.datasets.pages.max_tokens=129 is above the language model's 128 positions: set it to at most 128",
        "run.validation.datasets.held.max_tokens=129 is above",
    ):
        assert expected in str(caught.value)
    assert not (tmp_path / "config.yaml").exists()


def test_positions_are_read_from_a_folder_too(world: Path, tmp_path: Path) -> None:
    train(config(world, tmp_path / "lm", "language", steps=1))
    settings = config(world, tmp_path / "run", "flamingo")
    settings.model.language = LanguageSource(name=str(tmp_path / "lm" / "model"))
    settings.data.datasets["pages"]["max_tokens"] = 200
    assert any("pages.max_tokens=200 is above the language model's 128" in clause for clause in settings.problems())
    settings.data.datasets["pages"]["max_tokens"] = 128
    assert settings.problems() == []


def test_learned_positions_bound_the_default_length(world: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path, "flamingo")
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    settings.model.language = LanguageSource(config=gpt2, tokenizer=str(world / "tokenizer"))
    assert [text for text in settings.problems() if "max_tokens" in text] == [
        "data.datasets.pairs.max_tokens=256 is above the language model's 64 positions: set it to at most 64"
    ]
    assert DatasetSpec(name="a", batch_size=1).max_tokens == DEFAULT_MAX_TOKENS
