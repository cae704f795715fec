"""The typed config: impossible values are all named before anything is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from flamingo.training.config import RunConfig, Sharding, TrainConfig, differences, flatten, unavailable
from flamingo.training.model_config import VisionSource


def test_adapters_of_blocks_are_for_objectives_with_blocks() -> None:
    for objective in ("contrastive", "language"):
        config = TrainConfig(objective=objective)
        assert "cross_attention=lora" not in "; ".join(config.problems())
        config.model.freeze.cross_attention = "lora"
        expected = f"model.freeze.cross_attention=lora is not for objective {objective}"
        assert expected in "; ".join(config.problems())


def test_all_problems_are_reported_at_once() -> None:
    config = TrainConfig(run=RunConfig(steps=0, keep_last=1))
    config.objective = "flamenco"
    config.model.freeze.language = "half"  # type: ignore[assignment]
    text = "; ".join(config.problems())
    for expected in (
        "objective=flamenco is not one of align, contrastive, language, flamingo, preference",
        "model.freeze.language=half is not one of frozen, train",
        "run.steps=0 must be at least 1",
        "run.keep_last=1 must be at least 2",
        "data.datasets is empty",
    ):
        assert expected in text


def test_batch_must_divide_over_processes_and_pieces() -> None:
    config = TrainConfig(objective="language", run=RunConfig(micro_batches=2))
    config.model.language.config = {"model_type": "gpt2"}
    config.data.datasets = {"documents": {"batch_size": 6}}
    assert config.problems(world_size=1) == []
    (problem,) = config.problems(world_size=2)
    assert "data.datasets.documents.batch_size=6 is not divisible" in problem
    assert "2 x 2" in problem


def test_contrastive_refuses_pieces() -> None:
    config = TrainConfig(objective="contrastive", run=RunConfig(micro_batches=2))
    config.model.vision = VisionSource(config={"embed_dim": 8})
    config.data.datasets = {"a": {"batch_size": 4}}
    config.model.language.tokenizer = "folder"
    (problem,) = config.problems()
    assert "run.micro_batches must be 1" in problem


def test_flatten_and_differences() -> None:
    before, now = TrainConfig().as_dict(), TrainConfig(run=RunConfig(steps=5, dir="elsewhere")).as_dict()
    assert flatten(now)["run.steps"] == 5
    assert differences(before, now) == []  # longer, and moved: the same updates
    now["optim"]["lr"] = 1.0
    assert differences(before, now) == ["optim.lr (0.0001 -> 1.0)"]


def test_every_impossible_combination_is_named_with_its_remedy() -> None:
    config = TrainConfig(objective="flamingo", run=RunConfig(parallel="none", precision="bf16"))
    config.data.datasets = {"documents": {"batch_size": 8}}
    config.model.init = "folder"
    config.model.vision.config = {"embed_dim": 8}
    config.model.freeze.language = "lora"
    config.model.lora.rank = 0
    config.model.lora.targets = []
    config.run.sharding = Sharding(size=3, frozen="replicate", frozen_precision="fp32", cpu_offload=True)
    text = "; ".join(config.problems(world_size=4))
    for expected in (
        "model.init and model.vision both say where weights come from: remove one of them",
        "model.lora.rank=0 must be at least 1",
        "model.lora.targets is empty",
        "run.sharding.size=3 is for run.parallel=hybrid, not none",
        "run.sharding.frozen_precision=fp32 with run.sharding.frozen=replicate cannot compute in bf16: set it to auto",
        "run.parallel=none with 4 processes would train 4 models: use auto",
        "run.parallel=none cannot compute in bf16: use run.parallel=auto",
        "run.sharding.cpu_offload has no effect with run.parallel=none: use run.parallel=fsdp",
    ):
        assert expected in text
    config.run = RunConfig(parallel="hybrid", sharding=Sharding(size=3, frozen_precision="bf16"))
    text = "; ".join(config.problems(world_size=4))
    assert "run.sharding.size=3 does not divide the 4 processes" in text
    assert "run.sharding.frozen_precision=bf16 needs run.precision=bf16" in text
    config.objective = "language"
    text = "; ".join(config.problems())
    assert "model.init is for objective flamingo, not language" in text
    assert "model.freeze.language=lora adapts an existing language model: set model.language.name" in text
    config.model.language.name = "folder"
    assert "model.freeze" not in "; ".join(config.problems())
    config.objective = "contrastive"
    text = "; ".join(config.problems())
    assert "model.freeze.language=lora is for objectives flamingo and language: set it to frozen" in text


def test_a_contrastive_run_needs_a_shape_and_a_tokenizer() -> None:
    config = TrainConfig(objective="contrastive")
    config.data.datasets = {"pairs": {"batch_size": 8}}
    text = "; ".join(config.problems())
    assert "model.vision.config is missing" in text
    assert "model.language.tokenizer is missing: objective contrastive does not train its own" in text
    config.model.vision.name = "ViT-B-32"  # which has both
    assert config.problems() == []
    config.model.vision.final_norm = True
    assert config.problems() == ["model.vision.final_norm is for objective flamingo, not contrastive: remove it"]


def test_what_the_machine_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(run=RunConfig(compile=True))
    config.model.init = str(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    config.run.wandb = "mine"
    text = "; ".join(unavailable(config))
    if importlib.util.find_spec("wandb") is None:
        assert "run.wandb=mine needs wandb: pip install 'flamingo-vlm[wandb]', or run.wandb=null" in text
    assert f"model.init={tmp_path} is not a model folder (config.json is missing)" in text
    if not torch.cuda.is_available():
        assert "run.compile=true needs a C++ compiler" in text
        config.run.device = "cuda"
        assert "run.device=cuda, but torch sees no GPU here" in "; ".join(unavailable(config))


def test_a_run_that_began_before_a_key_existed_has_its_default() -> None:
    before, now = TrainConfig().as_dict(), TrainConfig().as_dict()
    del before["model"]["lora"], before["run"]["sharding"], before["optim"]["weight_decay_factors"]
    assert differences(before, now) == []
    now["optim"]["weight_decay_factors"]["language"] = 0.5
    assert differences(before, now) == ["optim.weight_decay_factors.language (1.0 -> 0.5)"]
