"""A loss is a weighted sum of datasets and of named terms: in the gradient, and in what is logged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flamingo.training.metrics.throughput import mean_losses
from flamingo.training.objectives import language
from tests.training.world import config, write_world
from train import train

Clip = Callable[..., Tensor]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def first_gradient(
    world: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, weights: dict[str, float], objective: str = "flamingo"
) -> Tensor:
    """The gradient of a run's first update, before it is clipped."""
    settings = config(world, run_dir, objective, steps=1)
    settings.data.datasets = {
        name: {**dataset, "weight": weights[name]}
        for name, dataset in settings.data.datasets.items()
        if name in weights
    }
    gradients: list[Tensor] = []
    clip: Clip = nn.utils.clip_grad_norm_

    def record(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        gradients.append(torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None]))
        return clip(parameters, max_norm)

    with monkeypatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", record)
        train(settings)
    (gradient,) = gradients
    assert gradient.norm() > 0
    return gradient


def test_twice_the_weight_of_a_dataset_is_twice_its_gradient(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradient(name: str, **weights: float) -> Tensor:
        return first_gradient(world, tmp_path / name, monkeypatch, weights)

    pages, pairs = gradient("pages", pages=1.0), gradient("pairs", pairs=1.0)
    assert torch.equal(gradient("double", pairs=2.0), 2.0 * pairs)
    torch.testing.assert_close(gradient("both", pages=1.0, pairs=2.0), pages + 2.0 * pairs, rtol=1e-4, atol=1e-6)


class WithShrinkage(language.LanguageObjective):
    """Adds a term of its own: the mean square of the logits' last position, one count a row."""

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, int]:
        return {**super().counts(batch), "shrinkage": len(batch["input_ids"])}

    def sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        shrinkage = out.logits[:, -1].float().square().mean(-1).sum()
        return {"text": language.token_loss_sum(out.logits, batch["labels"]), "shrinkage": shrinkage}


def test_a_second_term_is_added_and_logged_apart(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = language.build
    train(config(world, tmp_path / "one", "language", steps=2))
    monkeypatch.setattr(language, "build", lambda *given: replace(build(*given), objective=WithShrinkage()))
    for name, micro_batches in (("two", 1), ("accumulated", 4)):
        settings = config(world, tmp_path / name, "language", steps=2, micro_batches=micro_batches)
        settings.run.validation.every = 1
        held_out = {"shards": [str(world / "words")], "batch_size": 8, "max_tokens": 32}
        settings.run.validation.datasets = {"held": held_out}
        train(settings)
    one, two, accumulated = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two", "accumulated")
    )
    assert [key for key in one[0] if key.startswith("loss")] == ["loss", "loss/words"]
    for line in two:
        assert line["loss"] == line["loss/words"] == line["loss/words/text"] + line["loss/words/shrinkage"]
        assert line["loss/words/shrinkage"] > 0
        assert line["validation/held"] == line["validation/held/text"] + line["validation/held/shrinkage"]
    assert two[0]["loss/words/text"] == one[0]["loss"]
    assert two[1]["loss/words/text"] != one[1]["loss"]  # the second term has trained too
    for key in ("loss/words/text", "loss/words/shrinkage"):
        assert [line[key] for line in accumulated] == pytest.approx([line[key] for line in two], abs=2e-6)


def test_means_are_named_by_dataset_and_by_term_where_there_are_several() -> None:
    sums = {("a", "text"): 6.0, ("b", "text"): 8.0, ("b", "extra"): 1.0}
    divisors = {("a", "text"): 3.0, ("b", "text"): 4.0, ("b", "extra"): 2.0}
    assert mean_losses({"a": 1.0, "b": 0.5}, sums, divisors) == {
        "loss": 3.25,
        "loss/a": 2.0,
        "loss/b": 2.5,
        "loss/b/text": 2.0,
        "loss/b/extra": 0.5,
    }
