"""A frozen encoder that encodes each image once trains to the same bits, and what would change that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flamingo.errors import UserError
from flamingo.training.config import TrainConfig
from flamingo.vision.features import FrozenFeatures
from flamingo.vision.image_store import ImageStore
from tests.training.commands import lines, losses
from tests.training.world import config, write_world
from train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def cached(world: Path, run_dir: Path, kind: str | None, folder: Path | None = None, **run: object) -> TrainConfig:
    settings = config(world, run_dir, "flamingo", **run)
    settings.model.vision.cache = kind  # type: ignore[assignment]
    settings.model.vision.cache_dir = str(folder or run_dir / "features")
    return settings


def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with every frame that is encoded for a cache."""
    seen: list[int] = []
    keep = FrozenFeatures._keep

    def counted(self: FrozenFeatures, digest: str, tokens: torch.Tensor) -> None:
        seen.append(1)
        keep(self, digest, tokens)

    monkeypatch.setattr(FrozenFeatures, "_keep", counted)
    return seen


def test_losses_are_those_without_a_cache(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(cached(world, tmp_path / "plain", None, steps=6))
    seen = encoded(monkeypatch)
    train(cached(world, tmp_path / "memory", "memory", steps=6))
    once = len(seen)
    shown = sum(line["images_per_s"] > 0 for line in lines(tmp_path / "plain"))
    assert shown == 6
    train(cached(world, tmp_path / "disk", "disk", tmp_path / "shared", steps=6))
    assert len(seen) == 2 * once
    train(cached(world, tmp_path / "again", "disk", tmp_path / "shared", steps=6))  # another run, the same folder
    assert len(seen) == 2 * once
    assert losses(tmp_path / "memory") == losses(tmp_path / "disk") == losses(tmp_path / "again")
    assert losses(tmp_path / "memory") == losses(tmp_path / "plain")


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_run_goes_on_bit_for_bit(world: Path, tmp_path: Path, kind: str) -> None:
    train(cached(world, tmp_path / "whole", kind, steps=4))
    train(cached(world, tmp_path / "parts", kind, steps=2))
    for file in (tmp_path / "parts" / "features").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-7])  # what a full disk leaves is encoded again
    train(cached(world, tmp_path / "parts", kind, steps=4))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_another_transform_is_another_run(world: Path, tmp_path: Path) -> None:
    train(cached(world, tmp_path / "run", "disk", steps=2))
    settings = cached(world, tmp_path / "run", "disk", steps=4)
    settings.model.vision.resize_mode = "squash"
    with pytest.raises(UserError, match=r"another config: model.vision.resize_mode"):
        train(settings)
    with pytest.raises(UserError, match=r"another config: model.vision.cache"):
        train(cached(world, tmp_path / "run", None, steps=4))


def test_in_training_evaluation_leaves_features_fit_for_training() -> None:
    features = FrozenFeatures()
    frames = torch.arange(2 * 12, dtype=torch.uint8).view(2, 3, 2, 2)
    layer = torch.nn.Linear(2, 2)
    calls: list[int] = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return layer(pixels.float().flatten(2).transpose(1, 2)[..., :2])

    with torch.inference_mode():
        first = features(frames, encode, torch.float32)
    again = features(frames.flip(0), encode, torch.float32).flip(0)
    assert torch.equal(first, again)
    assert calls == [1, 1]
    (again * torch.nn.Parameter(torch.ones(2))).sum().backward()
    assert torch.equal(features(frames, encode, torch.bfloat16), first)  # kept apart, by precision
    assert calls == [1] * 4


def test_a_full_cache_goes_on_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean((2, 3))[:, None]

    frames = torch.arange(5 * 12, dtype=torch.uint8).view(5, 3, 2, 2)
    for features in (FrozenFeatures(limit=40), FrozenFeatures(ImageStore(tmp_path, "key", 30))):
        for _ in range(2):
            assert torch.equal(features(frames, encode, torch.float32), frames.float().mean((2, 3))[:, None])
        assert 5 < features.encoded < 10
    assert capsys.readouterr().err.count("the feature cache is full") == 2


def test_what_would_change_the_features_is_refused(world: Path, tmp_path: Path) -> None:
    settings = cached(world, tmp_path, "memory")
    settings.model.freeze.vision = "train"
    settings.data.datasets["pages"]["flip"] = True
    settings.data.datasets["pairs"]["colour"] = 0.2
    problems = "\n".join(settings.problems())
    assert "model.vision.cache=memory keeps what a frozen encoder gives: set model.freeze.vision=frozen" in problems
    assert "data.datasets.pages.flip, which changes images at random" in problems
    assert "data.datasets.pairs.colour" in problems
    assert cached(world, tmp_path, "disk").problems() == []
    other = config(world, tmp_path, "contrastive")
    other.model.vision.cache = "disk"
    assert "is for objective flamingo, not contrastive" in "\n".join(other.problems())
