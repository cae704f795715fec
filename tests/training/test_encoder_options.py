"""What a config says of the encoder's tokens and the blocks' places, for encoders by name and by shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, CLIPVisionModel

from flamingo import FlamingoForConditionalGeneration
from flamingo.training.config import TrainConfig
from flamingo.training.model_config import LanguageSource, VisionSource
from flamingo.training.objectives.build import build_flamingo, flamingo_shape
from tests.training.world import CLIP, LLAMA, config, write_world
from train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `encoders/`: a CLIP of transformers' and one of open_clip's, both for images of 16 pixels."""
    world = write_world(tmp_path_factory.mktemp("world"))
    shape = CLIPVisionConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    CLIPVisionModel(shape).save_pretrained(world / "encoders" / "transformers")
    made = train(config(world, world / "clip", "contrastive", steps=1))
    made.rename(world / "encoders" / "open_clip")
    return world


def of(world: Path, run_dir: Path, name: str | None, **vision: bool | int) -> TrainConfig:
    settings = config(world, run_dir, "flamingo", steps=1)
    source = {"config": CLIP} if name is None else {"name": str(world / "encoders" / name)}
    settings.model.vision = VisionSource(**source, **vision)  # type: ignore[arg-type]
    settings.model.cross_attn_layers = [1]
    return settings


@pytest.mark.parametrize("name", ["transformers", "open_clip", None])
def test_they_are_heeded_and_saved(world: Path, tmp_path: Path, name: str | None) -> None:
    settings = of(world, tmp_path / "run", name, class_token=True, final_norm=True, image_size=32)
    if name is None:  # a plan's shape too
        language = LanguageSource(config={**LLAMA, "vocab_size": 300})
        shape = flamingo_shape(replace(settings.model, language=language)).vision
        assert (shape.class_token, shape.final_norm, shape.image_size) == (True, True, 32)
    model = FlamingoForConditionalGeneration.from_pretrained(train(settings))
    encoder = model.vision_encoder
    assert (encoder.class_token, encoder.final_norm, encoder.image_size) == (True, True, 32)
    assert model.config.cross_attn_layers == [1]
    assert len(model.cross_attn_blocks) == 1
    plain = build_flamingo(of(world, tmp_path / "plain", name).model)[0].vision_encoder
    assert (plain.class_token, plain.final_norm, plain.image_size) == (False, False, 16)


def test_beside_a_whole_model_they_are_refused(world: Path, tmp_path: Path) -> None:
    settings = of(world, tmp_path / "run", None, class_token=True, final_norm=False)
    settings.model.init, settings.model.vision.config = "folder", None
    settings.model.language.add_bos_token = True
    text = "; ".join(settings.problems())
    for key in ("vision.class_token", "vision.final_norm", "language.add_bos_token"):
        assert f"model.{key} has no effect with model.init, whose model has its own: remove it" in text
