"""Every connector of the table through everything that a model does: forward, gradients, generate, save and load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flamingo import FlamingoConfig, FlamingoForConditionalGeneration, UserError
from flamingo.layers.connector import CONNECTORS, connector_class
from flamingo.layers.mlp_connector import MLPConnector
from flamingo.training.objectives.flamingo import FlamingoObjective
from tests.model import tiny
from tests.training.test_flops import ours, torch_counts

PATCHES = (tiny.SIZE // 14) ** 2
SMALL: dict[str, dict[str, Any]] = {"perceiver": {"depth": 1, "heads": 2, "head_dim": 8, "latents": 3, "width": 40}}
LATENTS = {"perceiver": 3, "mlp": PATCHES}


def flamingo(connector: str, **options: Any) -> Any:
    return tiny.flamingo("llama", connector=connector, resampler=SMALL.get(connector, {"width": 40}) | options)


@pytest.mark.parametrize("connector", list(CONNECTORS))
def test_the_model_takes_what_the_connector_says(connector: str) -> None:
    model, processor = flamingo(connector)
    assert isinstance(model.resampler, connector_class(connector))
    assert model.resampler.num_latents(1, PATCHES) == LATENTS[connector]
    assert model.resampler.empty().shape[::2] == (0, 40)
    assert model.part_of("resampler.anything") == "resampler"
    inputs = tiny.batch(processor, padding_side="right")
    labels = tiny.labels_of(inputs, model.config.image_token_id)
    out = model.train()(**inputs, labels=labels)
    assert out.media_features.shape == (3, LATENTS[connector], 40)
    out.loss.backward()
    for name, parameter in model.resampler.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    model.freeze({"resampler": "frozen"})
    assert not any(parameter.requires_grad for parameter in model.resampler.parameters())


@pytest.mark.parametrize("connector", list(CONNECTORS))
def test_images_decide_and_a_cache_changes_nothing(connector: str) -> None:
    model, processor = flamingo(connector)
    inputs = tiny.batch(processor)
    out = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(out, model.generate(**inputs, max_new_tokens=4, use_cache=False))
    assert torch.equal(out, model.generate(**inputs, max_new_tokens=4, num_beams=1))
    with torch.no_grad():
        before = model(**inputs).logits
        after = model(**(dict(inputs) | {"pixel_values": 255 - inputs["pixel_values"]})).logits
    assert (before - after).abs().max() > 1e-2
    assert torch.allclose(before[2], after[2], atol=1e-6)  # the row without an image
    assert model.score_candidates(inputs, [[40], [41, 42]]).shape == (3, 2)


@pytest.mark.parametrize("connector", list(CONNECTORS))
def test_an_image_after_a_turn_of_text(connector: str) -> None:
    """The cache of a row without images, whose number of latents nobody knows yet, takes some later."""
    model, processor = flamingo(connector)
    text = processor(text="no image")
    whole = processor(images=[tiny.picture(0)], text="no image<image>A")
    start = text["input_ids"].shape[1]
    with torch.no_grad():
        past = model(**text, use_cache=True).past_key_values
        more = dict(whole) | {"input_ids": whole["input_ids"][:, start:]}
        later = model(**more, past_key_values=past).logits
        torch.testing.assert_close(later, model(**whole).logits[:, start:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("connector", list(CONNECTORS))
def test_save_and_load(connector: str, tmp_path: Path) -> None:
    model, processor = flamingo(connector)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["connector"] == connector
    assert saved["resampler_config"]["width"] == 40
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert type(loaded.resampler) is type(model.resampler)
    assert loaded.config.to_dict()["resampler_config"] == model.config.resampler_config
    inputs = tiny.batch(processor)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("connector", list(CONNECTORS))
@pytest.mark.parametrize("frames", [1, 2])
def test_flops_are_what_torch_counts(connector: str, frames: int) -> None:
    model, processor = flamingo(connector)
    model.train()
    clip = [tiny.picture(0)] * frames
    inputs = processor(images=[[clip], [clip]], text=["<image>A cat and a dog", "<image>A dog and a cat"])
    batch = {**inputs, "labels": inputs["input_ids"].clone()}

    def step() -> None:
        FlamingoObjective().sums(model, batch)["text"].backward()
        model.zero_grad()

    step()
    assert ours(model, step) == pytest.approx(torch_counts(step), rel=0.02)


def test_the_mlp_is_the_formula() -> None:
    torch.manual_seed(0)
    module = MLPConnector(6, width=10)
    x = torch.randn(2, 3, 5, 6, requires_grad=True)
    up, down = module.up_proj, module.down_proj
    slow = torch.stack(
        [torch.cat([F.gelu(f @ up.weight.T + up.bias) @ down.weight.T + down.bias for f in i]) for i in x]
    )
    torch.testing.assert_close(module(x), slow)
    assert module(x).shape == (2, module.num_latents(3, 5), 10)
    flat = module(x.flatten(0, 1), [3, 3])
    torch.testing.assert_close(flat, slow)
    assert MLPConnector(6).width == 6
    assert module.half()(x).dtype == torch.float16


def test_the_mlp_needs_clips_of_one_length() -> None:
    model, processor = flamingo("mlp")
    mixed = processor(images=[[[tiny.picture(0)], [tiny.picture(1)] * 2]], text=["<image>A<image>B"])
    with pytest.raises(UserError, match=r"have 1 to 2 frames, but this connector \(MLPConnector\) needs the same"):
        model(**mixed)
    with torch.no_grad():
        past = model(**processor(images=[tiny.picture(0)], text="<image>A"), use_cache=True).past_key_values
        later = processor(images=[[[tiny.picture(1)] * 2]], text=["<image>B"])
        with pytest.raises(UserError, match="have 8 latents each, those before them 4"):
            model(input_ids=later["input_ids"], pixel_values=later["pixel_values"], past_key_values=past)


def test_unknown_connectors_and_options_are_refused() -> None:
    lm = tiny.lm_config("llama")
    with pytest.raises(UserError, match="connector='qformer' must be one of perceiver, mlp"):
        FlamingoConfig(text_config=lm, connector="qformer")
    with pytest.raises(UserError, match=r"resampler_config\.depth is not an option; known are width, activation"):
        FlamingoConfig(text_config=lm, connector="mlp", resampler_config={"depth": 2})
    with pytest.raises(UserError, match=r"resampler_config\.width=0 must be at least 1"):
        FlamingoConfig(text_config=lm, connector="mlp", resampler_config={"width": 0})


def test_a_connector_draws_its_own_weights() -> None:
    """`initialize` of the perceiver is what a missing weight gets: its own deviation, not torch's."""
    perceiver: Any = connector_class("perceiver")(16, latents=400, depth=1, init_std=0.02, max_frames=2)
    with torch.no_grad():
        nn.init.zeros_(perceiver.latents)
    perceiver.initialize()
    assert float(perceiver.latents.detach().std()) == pytest.approx(0.02, rel=0.1)
    again: Any = connector_class("mlp")(16)
    before = again.up_proj.weight.clone()
    again.initialize()  # which leaves to torch what torch draws
    assert torch.equal(before, again.up_proj.weight)
