"""Configs, loading and saving as users of other models know them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    CLIPConfig,
    CLIPVisionConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from flamingo import FlamingoConfig, FlamingoForConditionalGeneration, UserError
from flamingo.config import FlamingoVisionConfig
from tests.model import tiny

SMALL: dict[str, Any] = {
    "resampler_config": {"depth": 1, "heads": 2, "head_dim": 8, "latents": 4},
    "cross_attention_config": {"heads": 2, "head_dim": 8},
}
OPEN_CLIP: dict[str, Any] = {
    "arch": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 28, "layers": 2, "width": 64, "head_width": 32, "patch_size": 14},
        "quick_gelu": True,
    },
    "image_size": 28,
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny.flamingo("llama")[0].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def implementations(model: nn.Module) -> dict[str, str]:
    return {type(m).__name__: m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)}


def logits(model: Any) -> torch.Tensor:
    inputs = tiny.batch(tiny.flamingo("llama")[1])
    with torch.no_grad():
        return model(**inputs).logits


def test_the_encoders_config_is_the_object_inside_the_models() -> None:
    model, _ = tiny.flamingo("llama")
    assert model.config.vision_config.encoder_config is model.vision_encoder.tower.config
    again = FlamingoForConditionalGeneration(model.config)
    assert again.config.vision_config.encoder_config is again.vision_encoder.tower.config
    assert model.config.vision_config.hidden_size == model.config.vision_config.width == 24


@pytest.mark.parametrize(
    "given",
    [
        CLIPVisionConfig(hidden_size=24, image_size=28, patch_size=14, num_hidden_layers=2),
        CLIPVisionConfig(hidden_size=24, image_size=28, patch_size=14, num_hidden_layers=2).to_dict(),
        CLIPConfig(vision_config={"hidden_size": 24, "image_size": 28, "patch_size": 14, "num_hidden_layers": 2}),
    ],
    ids=["object", "dictionary", "dual encoder"],
)
def test_an_encoders_own_config_is_taken_as_it_is(given: Any) -> None:
    config = FlamingoConfig(vision_config=given, text_config=tiny.lm_config("llama"), **SMALL)
    assert isinstance(config.vision_config, FlamingoVisionConfig)
    assert isinstance(config.vision_config.encoder_config, CLIPVisionConfig)
    assert (config.vision.kind, config.vision.width, config.vision.image_size) == ("transformers", 24, 28)


@pytest.mark.parametrize("family", [CLIPVisionConfig, SiglipVisionConfig])
def test_a_config_goes_through_a_file(tmp_path: Path, family: Any) -> None:
    encoder = family(hidden_size=24, image_size=28, patch_size=14, num_hidden_layers=2, num_attention_heads=2)
    config = FlamingoConfig(vision_config=encoder, text_config=tiny.lm_config("llama"), **SMALL)
    config.vision_config.told_by_a_library = 3  # what others hang on a config is saved and comes back
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert again.vision == config.vision
    assert again.vision_config.told_by_a_library == 3
    alone: Any = FlamingoVisionConfig.from_pretrained(tmp_path)
    assert alone.encoder_config.to_dict() == encoder.to_dict()


def test_one_field_of_the_encoder_is_changed_at_loading(tmp_path: Path) -> None:
    config = FlamingoConfig(vision_config=OPEN_CLIP, text_config=tiny.lm_config("llama"), **SMALL)
    config.save_pretrained(tmp_path)
    again = FlamingoConfig.from_pretrained(tmp_path, vision_config={"resize_mode": "squash"})
    assert (again.vision.resize_mode, again.vision.arch) == ("squash", OPEN_CLIP["arch"])


def test_what_is_written_by_hand_holds_nothing_unknown() -> None:
    with pytest.raises(UserError, match=r"vision_config\.patches is not an option; known are kind"):
        FlamingoConfig(vision_config={**OPEN_CLIP, "patches": 2}, text_config=tiny.lm_config("llama"))
    with pytest.raises(UserError, match=r"vision_config\.arch has no model_type"):
        FlamingoConfig(vision_config={"kind": "transformers", "arch": {"hidden_size": 3}})


@pytest.mark.parametrize("wanted", ["eager", "sdpa"])
def test_attn_implementation_reaches_the_encoder(saved: Path, wanted: str, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("transformers").addHandler(caplog.handler)
    loaded = FlamingoForConditionalGeneration.from_pretrained(saved, attn_implementation=wanted)
    assert set(implementations(loaded).values()) == {wanted}
    built = FlamingoForConditionalGeneration._from_config(loaded.config, attn_implementation=wanted)
    assert set(implementations(built).values()) == {wanted}
    loaded.set_attn_implementation("eager" if wanted == "sdpa" else "sdpa")
    assert wanted not in implementations(loaded).values()
    assert "without finding the associated sub-model" not in caplog.text
    loaded.set_attn_implementation({"vision_config": wanted})
    assert implementations(loaded)["CLIPVisionModel"] == wanted
    assert implementations(loaded)["LlamaForCausalLM"] != wanted
    assert "without finding the associated sub-model" not in caplog.text


def test_attn_implementation_of_one_part(saved: Path) -> None:
    options = {"text_config": "sdpa", "vision_config": "eager"}
    model = FlamingoForConditionalGeneration.from_pretrained(saved, attn_implementation=options)
    found = implementations(model)
    assert (found["LlamaForCausalLM"], found["CLIPVisionModel"]) == ("sdpa", "eager")


def test_built_backbones_keep_their_attention() -> None:
    encoder, lm = tiny.vision(), tiny.lm("llama")
    encoder.set_attn_implementation("eager")
    lm.set_attn_implementation("eager")
    model, _ = FlamingoForConditionalGeneration.from_backbones(
        encoder, lm, image_size=tiny.SIZE, tokenizer=tiny.tokenizer()
    )
    assert {encoder.config._attn_implementation, lm.config._attn_implementation} == {"eager"}
    assert model.config.vision_config.encoder_config is encoder.config


def without(folder: Path, prefix: str) -> Iterator[str]:
    """Take the tensors of this prefix out of a folder's file."""
    weights = load_file(folder / "model.safetensors")
    gone = [name for name in weights if name.startswith(prefix)]
    save_file({k: v for k, v in weights.items() if k not in gone}, folder / "model.safetensors", {"format": "pt"})
    yield from gone


def test_buffers_that_a_file_lacks_are_the_configs(saved: Path) -> None:
    model = FlamingoForConditionalGeneration.from_pretrained(saved)
    wanted = logits(model)
    assert sorted(without(saved, "vision_encoder.mean")) == ["vision_encoder.mean"]
    assert sorted(without(saved, "vision_encoder.std")) == ["vision_encoder.std"]
    again = FlamingoForConditionalGeneration.from_pretrained(saved)
    assert torch.equal(again.vision_encoder.mean, model.vision_encoder.mean)
    assert torch.equal(again.vision_encoder.std, model.vision_encoder.std)
    assert torch.equal(logits(again), wanted)


def test_weights_that_a_file_lacks_are_drawn_as_by_the_constructor(saved: Path) -> None:
    """A gated block and a resampler without weights: were taken from memory as it was found.

    Our own `from_pretrained` refuses such a file; transformers' below it, which others may call, fills what is missing.
    """
    assert list(without(saved, "cross_attn_blocks."))
    assert list(without(saved, "resampler."))
    with pytest.raises(UserError, match=r"lacks the weight cross_attn_blocks\..* and \d+ more"):
        FlamingoForConditionalGeneration.from_pretrained(saved)
    again = PreTrainedModel.from_pretrained.__func__(FlamingoForConditionalGeneration, saved)  # type: ignore[attr-defined]
    fresh = FlamingoForConditionalGeneration(again.config)
    drawn = dict(again.named_parameters())
    for name, parameter in fresh.named_parameters():
        if not name.startswith(("cross_attn_blocks.", "resampler.")):
            continue
        found = drawn[name].detach()
        assert found.isfinite().all(), name
        if parameter.detach().unique().numel() == 1:  # norms and gates
            assert torch.equal(found, parameter.detach()), name
        else:
            torch.testing.assert_close(found.std(), parameter.detach().std(), rtol=0.3, atol=0, msg=name)
    assert logits(again).isfinite().all()


def test_from_pretrained_by_keyword_and_from_a_state_dict(saved: Path) -> None:
    model = FlamingoForConditionalGeneration.from_pretrained(pretrained_model_name_or_path=saved)
    again = FlamingoForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(logits(model), logits(again))
    assert {n for n, _ in again.trainable_parameters()} == {n for n, _ in model.trainable_parameters()}
    with pytest.raises(UserError, match=r"needs config=\.\.\. and state_dict="):
        FlamingoForConditionalGeneration.from_pretrained(None, config=model.config)


def test_subfolder_and_config_given(saved: Path) -> None:
    inside = FlamingoForConditionalGeneration.from_pretrained(saved.parent, subfolder="model")
    given = FlamingoForConditionalGeneration.from_pretrained(saved, config=inside.config)
    assert torch.equal(logits(inside), logits(given))
    with pytest.raises(UserError, match=r"none holds no Flamingo model: config\.json is missing"):
        FlamingoForConditionalGeneration.from_pretrained(saved.parent, subfolder="none")
    with pytest.raises(UserError, match="no/such holds no Flamingo model"):
        FlamingoForConditionalGeneration.from_pretrained("no/such")


def test_a_name_in_the_local_cache_needs_no_network(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    saved.rename(repository / "snapshots" / ("0" * 40))
    model = FlamingoForConditionalGeneration.from_pretrained("someone/small", cache_dir=tmp_path / "hub")
    assert logits(model).isfinite().all()


def test_save_pretrained_takes_what_others_take(saved: Path, tmp_path: Path) -> None:
    model = FlamingoForConditionalGeneration.from_pretrained(saved)
    model.save_pretrained(save_directory=tmp_path / "again", state_dict=model.state_dict(), max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert torch.equal(logits(FlamingoForConditionalGeneration.from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_auto_classes(saved: Path, auto: Any) -> None:
    assert isinstance(auto.from_pretrained(saved), FlamingoForConditionalGeneration)
    assert isinstance(auto.from_config(AutoConfig.from_pretrained(saved)), FlamingoForConditionalGeneration)


def test_return_dict_false_at_the_call_and_in_the_config() -> None:
    model, processor = tiny.flamingo("llama")
    inputs = tiny.batch(processor)
    labels = tiny.labels_of(inputs, model.config.image_token_id)
    whole = model(**inputs, labels=labels)
    loss, found, *_ = model(**inputs, labels=labels, return_dict=False)
    assert torch.equal(loss, whole.loss)
    assert torch.equal(found, whole.logits)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)
    assert torch.equal(model(**inputs, return_dict=True).logits, whole.logits)


def test_gradient_checkpointing_in_the_config() -> None:
    config = tiny.flamingo("llama")[0].config
    config.gradient_checkpointing = True
    model = FlamingoForConditionalGeneration(config)
    assert model.is_activation_checkpointing
    inputs = tiny.batch(tiny.flamingo("llama")[1])
    loss = model.train()(**inputs, labels=tiny.labels_of(inputs, config.image_token_id)).loss
    loss.backward()
    assert all(p.grad is not None for n, p in model.trainable_parameters() if "output_rows" not in n)


@pytest.mark.parametrize("where", ["call", "config"])
def test_hidden_states_and_attentions(where: str) -> None:
    model, processor = tiny.flamingo("llama")
    model.set_attn_implementation("eager")
    inputs, options = tiny.batch(processor), {}
    if where == "call":
        options = {"output_hidden_states": True, "output_attentions": True}
    else:
        model.config.output_hidden_states = model.config.output_attentions = True
        assert model(**inputs, output_hidden_states=False).hidden_states is None
    out = model(**inputs, **options)
    assert (len(out.hidden_states), len(out.attentions)) == (5, 4)
    assert out.hidden_states[0].shape == (*inputs["input_ids"].shape, 32)


def test_attentions_without_an_implementation_that_has_them_are_refused() -> None:
    model, _ = tiny.flamingo("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="eager"):
        model.config.output_attentions = True
