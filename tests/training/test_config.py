"""The typed config: impossible values are all named before anything is loaded."""

from __future__ import annotations

from flamingo.training.config import (
    FreezePolicy,
    ModelConfig,
    RunConfig,
    TrainConfig,
    VisionSource,
    differences,
    flatten,
)


def test_all_problems_are_reported_at_once() -> None:
    config = TrainConfig(
        objective="flamenco",
        model=ModelConfig(freeze=FreezePolicy(language="half")),
        run=RunConfig(steps=0, keep_last=1),
    )
    text = "; ".join(config.problems())
    for expected in (
        "objective=flamenco is not one of contrastive, language, flamingo",
        "model.freeze.language=half is not one of frozen, train",
        "run.steps=0 is below its least value 1",
        "run.keep_last=1 is below its least value 2",
        "data.datasets is empty",
    ):
        assert expected in text


def test_batch_must_divide_over_processes_and_pieces() -> None:
    config = TrainConfig(objective="language", run=RunConfig(micro_batches=2))
    config.model.language.config = {"model_type": "gpt2"}
    config.data.datasets = {"pages": {"batch_size": 6}}
    assert config.problems(world_size=1) == []
    (problem,) = config.problems(world_size=2)
    assert "data.datasets.pages.batch_size=6 is not divisible" in problem
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
