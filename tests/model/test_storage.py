"""Weights keep their own precision on the disk, and quantisers touch the language model only."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from flamingo import FlamingoConfig, FlamingoForConditionalGeneration
from flamingo.errors import UserError
from flamingo.training.objectives.build import save_flamingo
from tests.model import tiny

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16


def mixed() -> Any:
    """Frozen parts in bfloat16, what trains in float32: what the docs recommend."""
    model, processor = tiny.flamingo("llama")
    for module in (model.vision_encoder.tower, model.language_model):
        module.to(BF16)
    return model, processor


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in model.state_dict().items()}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert dtypes(one) == dtypes(other)
    after = other.state_dict()
    assert not [name for name, value in one.state_dict().items() if not torch.equal(value, after[name])]


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
def test_each_weight_keeps_its_precision(tmp_path: Path, shards: dict[str, str]) -> None:
    model, _ = mixed()
    model.language_model.model.norm.to(FP32)  # within a part, too
    model.save_pretrained(tmp_path, **shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is bool(shards)
    for load in (FlamingoForConditionalGeneration, AutoModelForImageTextToText):
        asked: list[dict[str, Any]] = [{}, {"dtype": "auto"}, {"torch_dtype": "auto"}, {"device_map": "cpu"}]
        for options in asked:
            assert_same(model, load.from_pretrained(tmp_path, **options))
    again = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "twice")
    assert_same(model, FlamingoForConditionalGeneration.from_pretrained(tmp_path / "twice"))


@pytest.mark.parametrize("options", [{"dtype": BF16}, {"torch_dtype": FP32}, {"dtype": "float16"}])
def test_a_precision_that_is_asked_for_is_given(tmp_path: Path, options: dict[str, Any]) -> None:
    mixed()[0].save_pretrained(tmp_path)
    (asked,) = options.values()
    asked = getattr(torch, asked) if isinstance(asked, str) else asked
    again = FlamingoForConditionalGeneration.from_pretrained(tmp_path, **options)
    assert {value.dtype for value in again.parameters()} == {asked}
    # The next load is not affected.
    assert {p.dtype for _, p in FlamingoForConditionalGeneration.from_pretrained(tmp_path).trainable_parameters()} == {
        FP32
    }


def test_a_config_that_asks_for_a_precision_gets_it(tmp_path: Path) -> None:
    model, _ = tiny.flamingo("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "bfloat16"}))
    again = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert {value.dtype for value in again.parameters()} == {BF16}


def test_the_other_way_round_and_tied(tmp_path: Path) -> None:
    """A float32 backbone beside parts in bfloat16, with a tied head: nothing is rounded or widened."""
    model, _ = tiny.flamingo("llama", tied=True)
    model.resampler.to(BF16)
    model.vision_encoder.tower.to(FP16)
    model.save_pretrained(tmp_path)
    again = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert_same(model, again)
    lm = again.language_model
    assert lm.lm_head.weight is lm.model.embed_tokens.weight


def test_the_training_export_keeps_them(tmp_path: Path) -> None:
    model, processor = mixed()
    expected = copy.deepcopy(model)
    save_flamingo(model, processor, dict(model.state_dict()), tmp_path)
    assert_same(expected, FlamingoForConditionalGeneration.from_pretrained(tmp_path))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("part", ["language_model", "resampler", "vision_encoder"])
def test_integers_that_nobody_can_read_are_refused(tmp_path: Path, part: str, dtype: torch.dtype) -> None:
    model, _ = tiny.flamingo("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = next(key for key, value in weights.items() if key.startswith(part) and value.ndim == 2)
    save_file(weights | {name: weights[name].round().to(dtype)}, file, {"format": "pt"})
    for kind in (FlamingoForConditionalGeneration, AutoModelForImageTextToText):
        with pytest.raises(UserError, match=f"{name} is stored as {str(dtype).removeprefix('torch.')} and config.json"):
            kind.from_pretrained(tmp_path)


def test_backbones_in_a_precision_and_what_trains_in_float32(tmp_path: Path) -> None:
    tiny.lm("llama").save_pretrained(tmp_path / "lm")
    for language in (str(tmp_path / "lm"), tiny.lm("llama")):
        for dtype in (BF16, "bfloat16"):
            model, _ = FlamingoForConditionalGeneration.from_backbones(
                tiny.vision(), language, tokenizer=tiny.tokenizer(), image_size=tiny.SIZE, dtype=dtype
            )
            assert {p.dtype for p in model.language_model.parameters()} == {BF16}
            assert {p.dtype for p in model.vision_encoder.tower.parameters()} == {BF16}
            assert {p.dtype for _, p in model.trainable_parameters()} == {FP32}
    with pytest.raises(UserError, match=r"dtype=.int8. is not a floating-point precision: give torch\.bfloat16"):
        tiny.flamingo("llama", dtype="int8")


# Quantisation.


def bitsandbytes(bits: int = 4, **options: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason="4 and 8 bits are bitsandbytes'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **options)


QUANTIZERS = [(4, {}), (4, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}), (8, {})]


def packed(model: nn.Module) -> set[str]:
    """Names of the modules whose weight is in 4 or 8 bits."""
    kinds = ("Linear4bit", "Linear8bitLt")
    return {name for name, module in model.named_modules() if type(module).__name__ in kinds}


def quantized(folder: Path, quantizer: Any) -> Any:
    tiny.lm("llama").save_pretrained(folder / "lm")
    lm = AutoModelForCausalLM.from_pretrained(folder / "lm", quantization_config=quantizer)
    return FlamingoForConditionalGeneration.from_backbones(
        tiny.vision(), lm, image_size=tiny.SIZE, tokenizer=tiny.tokenizer(), cross_attn_every_n_layers=2
    )


@pytest.mark.parametrize(("bits", "options"), QUANTIZERS)
def test_a_quantized_lm_is_saved_and_loaded(tmp_path: Path, bits: int, options: dict[str, Any]) -> None:
    model, processor = quantized(tmp_path, bitsandbytes(bits, **options))
    inputs = tiny.batch(processor)
    with torch.no_grad():
        wanted = model(**inputs).logits
    model.save_pretrained(tmp_path / "saved")  # after it has been used, too
    again = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert packed(again) == packed(model) != set()
    assert all(name.startswith("language_model.model.layers") for name in packed(again))
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)
    again.save_pretrained(tmp_path / "twice")
    assert packed(FlamingoForConditionalGeneration.from_pretrained(tmp_path / "twice")) == packed(model)


@pytest.mark.parametrize(("bits", "options"), QUANTIZERS)
def test_quantizing_while_loading_touches_the_lm_only(tmp_path: Path, bits: int, options: dict[str, Any]) -> None:
    model, processor = mixed()
    model.save_pretrained(tmp_path)
    for quantizer in (bitsandbytes(bits, **options), bitsandbytes(bits, **options).to_dict()):
        again = FlamingoForConditionalGeneration.from_pretrained(tmp_path, quantization_config=quantizer)
        assert packed(again)
        assert all(name.startswith("language_model.model.layers") for name in packed(again))
        assert again.language_model.lm_head.weight.dtype.itemsize > 1
        before, after = dict(model.trainable_parameters()), dict(again.trainable_parameters())
        assert before.keys() == after.keys()
        assert not [name for name, value in before.items() if not torch.equal(value, after[name])]
        again.save_pretrained(tmp_path / "saved")
        inputs = tiny.batch(processor)
        with torch.no_grad():
            wanted = again(**inputs).logits
            loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "saved")
            torch.testing.assert_close(loaded(**inputs).logits, wanted, atol=1e-3, rtol=1e-2)


def test_modules_that_the_caller_skips_stay(tmp_path: Path) -> None:
    model, _ = quantized(tmp_path, bitsandbytes(4, llm_int8_skip_modules=["q_proj", "lm_head"]))
    assert packed(model)
    assert not [name for name in packed(model) if "q_proj" in name]
    model.save_pretrained(tmp_path / "saved")
    assert packed(FlamingoForConditionalGeneration.from_pretrained(tmp_path / "saved")) == packed(model)
    tiny.flamingo("llama")[0].save_pretrained(tmp_path / "plain")
    options = {"quantization_config": bitsandbytes(4, llm_int8_skip_modules=["q_proj", "lm_head"])}
    assert packed(FlamingoForConditionalGeneration.from_pretrained(tmp_path / "plain", **options)) == packed(model)


def test_an_lm_by_name_is_quantized_by_from_backbones(tmp_path: Path) -> None:
    tiny.lm("llama").save_pretrained(tmp_path)
    options = {"image_size": tiny.SIZE, "tokenizer": tiny.tokenizer(), "quantization_config": bitsandbytes(4)}
    model, _ = FlamingoForConditionalGeneration.from_backbones(tiny.vision(), str(tmp_path), **options)
    assert packed(model)
    with pytest.raises(UserError, match=r"quantization_config= is for a language model given by name"):
        FlamingoForConditionalGeneration.from_backbones(tiny.vision(), tiny.lm("llama"), **options)


def test_a_quantizer_that_would_touch_what_trains_is_refused(tmp_path: Path) -> None:
    class Everything:
        quant_method = "everything"

    tiny.flamingo("llama")[0].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="Everything cannot be told to leave modules alone"):
        FlamingoForConditionalGeneration.from_pretrained(tmp_path, quantization_config=Everything())
    model, _ = quantized(tmp_path, bitsandbytes())
    with pytest.raises(UserError, match="the language model is quantised, and packed weights have no gradient"):
        model.freeze({"language": "train"})
    model.vision_encoder.tower.hf_quantizer = model.language_model.hf_quantizer
    with pytest.raises(UserError, match="the vision encoder is quantised"):
        model.save_pretrained(tmp_path / "saved")


def test_a_quantized_lm_put_in_later_or_taken_out_is_saved_as_it_is(tmp_path: Path) -> None:
    model, _ = quantized(tmp_path, bitsandbytes())
    model.save_pretrained(tmp_path / "saved")
    again = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "saved")
    plain = tiny.flamingo("llama")[0].language_model
    again.language_model = plain
    again.config.text_config = plain.config
    again.save_pretrained(tmp_path / "plain")
    assert not packed(FlamingoForConditionalGeneration.from_pretrained(tmp_path / "plain"))
    assert "quantization_config" not in FlamingoConfig.from_pretrained(tmp_path / "plain").to_dict()


def test_gradients_pass_through_four_bits_after_generate(tmp_path: Path) -> None:
    """On some CPUs bitsandbytes lays weights out for inference in the first forward in eval mode: no gradient then."""
    model, processor = quantized(tmp_path, bitsandbytes())
    inputs = tiny.batch(processor)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.5)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    model.train()
    model(**inputs, labels=tiny.labels_of(inputs, model.config.image_token_id)).loss.backward()
    assert not [name for name, p in model.trainable_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
