"""The released models' shapes, built on the meta device: nothing is allocated, everything is counted."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, IdeficsConfig

from flamingo import FlamingoConfig, FlamingoForConditionalGeneration, UserError
from flamingo.backbones import open_clip_config
from flamingo.config import VisionConfig, num_decoder_layers
from flamingo.convert.idefics import clip_config, flamingo_options, llama_config
from flamingo.convert.presets import PRESETS, Preset, preset
from flamingo.training.compose import compose
from flamingo.training.memory_plan.plan import complete, meta_model
from flamingo.training.objectives.build import flamingo_shape
from flamingo.training.objectives.flamingo import FlamingoObjective
from tests.model import tiny

ROOT = Path(__file__).resolve().parents[2]


def shape(of: Preset) -> FlamingoConfig:
    """The config that converting this release's checkpoint would give, up to the tokenizer's ids."""
    if of.family == "idefics":
        source = IdeficsConfig(**of.config)
        vision = VisionConfig(kind="transformers", arch=clip_config(source).to_dict(), class_token=True)
        ids = {"new_token_ids": [32000, 32001], "image_token_id": 32001, "eoc_token_id": 2}
        options: dict[str, Any] = {"text_config": llama_config(source), **flamingo_options(source), **ids}
    else:
        kind = dict(of.text_config)
        text = CONFIG_MAPPING[kind.pop("model_type")](**kind)
        rows = text.vocab_size
        vision = open_clip_config("ViT-L-14-quickgelu", "openai")
        options = {
            "text_config": text,
            "cross_attn_every_n_layers": of.cross_attn_every_n_layers,
            "image_token_id": rows + 1,
            "eoc_token_id": rows,
        }
    return FlamingoConfig(vision_config=asdict(vision), **options)


@pytest.mark.parametrize("name", list(PRESETS))
def test_shape_is_the_published_one(name: str) -> None:
    released = PRESETS[name]
    config = shape(released)
    with torch.device("meta"):
        model = FlamingoForConditionalGeneration(config)
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    print(f"{name}: {billions:.2f} billion parameters")
    assert billions == pytest.approx(released.parameters, rel=0.16)
    layers, every = config.cross_attn_layers or [], released.cross_attn_every_n_layers
    assert layers[:2] == ([0, every] if released.family == "idefics" else [every - 1, 2 * every - 1])


def test_openflamingos_encoder_has_quick_gelu() -> None:
    for released in PRESETS.values():
        if released.family == "openflamingo":
            arch = open_clip_config(released.vision).arch or {}
            assert arch["quick_gelu"] is True  # also where the weights come from a file and no tag says so


def test_unknown_preset() -> None:
    assert preset("idefics-80b").parameters == 80
    with pytest.raises(UserError, match="preset=openflamingo-7b is unknown; the presets are openflamingo-3b"):
        preset("openflamingo-7b")


# What was released: MODEL.md, c.1 and c.6; layers, width and heads from the language models' cards.
RELEASED: dict[str, dict[str, Any]] = {
    "openflamingo_3b": {"kind": "mosaic_gpt", "layers": 24, "width": 2048, "heads": 16, "every": 1},
    "openflamingo_4b": {"kind": "gpt_neox", "layers": 32, "width": 2560, "heads": 32, "every": 2},
    "openflamingo_9b": {"kind": "mpt", "layers": 32, "width": 4096, "heads": 32, "every": 4},
}
EXPERIMENTS = sorted(path.stem for path in (ROOT / "hydra" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", list(RELEASED))
def test_yaml_and_preset_are_one_released_model(name: str) -> None:
    released = RELEASED[name]
    config = flamingo_shape(complete(compose([f"experiment={name}"]).model))
    wanted = shape(preset(name.replace("_", "-")))
    assert config.text_config.to_dict() == wanted.text_config.to_dict()
    assert config.resampler_config == wanted.resampler_config
    assert config.cross_attention_config == wanted.cross_attention_config
    assert config.cross_attn_layers == wanted.cross_attn_layers
    assert config.vision.arch == wanted.vision.arch

    text = config.text_config
    assert text.model_type == released["kind"]
    assert num_decoder_layers(text) == released["layers"]
    assert (text.hidden_size, text.num_attention_heads) == (released["width"], released["heads"])
    assert config.cross_attn_layers == list(range(released["every"] - 1, released["layers"], released["every"]))
    if released["kind"] == "mosaic_gpt":
        assert text.attn_qk_ln
    if released["kind"] == "gpt_neox":
        assert text.rope_parameters["partial_rotary_factor"] == 1.0
        assert not text.use_parallel_residual
    resampler, block = config.resampler, config.cross_attention
    assert (resampler.depth, resampler.heads, resampler.head_dim, resampler.latents) == (6, 8, 64, 64)
    assert (resampler.activation, resampler.ff_mult, resampler.max_frames) == ("gelu", 4.0, None)
    assert (block.heads, block.head_dim, block.ff_mult, block.norm, block.gate_init) == (8, 64, 4.0, "layernorm", 0.0)
    assert (config.vision.arch or {})["quick_gelu"] is True
    assert (config.vision.width, config.vision.image_size) == (1024, 224)
    assert not config.vision.final_norm
    assert not config.vision.class_token


def test_what_yaml_says_wins_over_the_preset() -> None:
    model = compose(["experiment=openflamingo_9b", "model.language.name=folder", "model.vision.name=other"]).model
    assert (model.language.name, model.language.config) == ("folder", None)
    assert (model.vision.name, model.vision.pretrained) == ("other", None)
    assert (
        compose(["experiment=openflamingo_9b", "model.cross_attn_every_n_layers=8"]).model.cross_attn_every_n_layers
        == 8
    )
    with pytest.raises(UserError, match=r"^model\.preset=flamingo-1b is unknown; the presets of openflamingo are"):
        compose(["model.preset=flamingo-1b"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_builds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, with the folders that an earlier experiment would have written."""
    monkeypatch.setenv("DEMO", str(tmp_path))
    tiny.tokenizer().save_pretrained(tmp_path / "data" / "toy" / "tokenizer")
    vision = compose(["experiment=demo_vision"]).model.vision.config
    language = complete(compose(["experiment=demo_language"]).model).language.config
    for folder in ("vision", "language"):
        (tmp_path / folder / "model").mkdir(parents=True)
    (tmp_path / "vision" / "model" / "open_clip_config.json").write_text(json.dumps({"model_cfg": vision}))
    (tmp_path / "language" / "model" / "config.json").write_text(json.dumps(language))
    flamingo_shape(complete(compose(["experiment=demo"]).model)).save_pretrained(tmp_path / "flamingo" / "model")
    model, objective = meta_model(compose([f"experiment={name}"]))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model, FlamingoForConditionalGeneration) == isinstance(objective, FlamingoObjective)
