"""The released models' shapes, built on the meta device: nothing is allocated, everything is counted."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, IdeficsConfig

from flamingo import FlamingoConfig, FlamingoForConditionalGeneration, UserError
from flamingo.backbones import open_clip_config
from flamingo.config import VisionConfig
from flamingo.convert.idefics import clip_config, flamingo_options, llama_config
from flamingo.convert.presets import PRESETS, Preset, preset


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
    if released.text_config.get("model_type", "llama") not in CONFIG_MAPPING:
        pytest.skip("MosaicGPT is not registered")
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
    with pytest.raises(UserError, match="no preset 'openflamingo-7b'; known are openflamingo-3b"):
        preset("openflamingo-7b")
