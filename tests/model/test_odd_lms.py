"""Language models that are stored in an unusual way, and those that cannot be used: one sentence each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, PreTrainedConfig

from flamingo import FlamingoForConditionalGeneration, UserError
from flamingo.conformance.tiny_models import tiny_lm
from flamingo.language.hooks import find_decoder_layers, table_shape, table_values
from tests.model import tiny


def around(lm: Any, **options: Any) -> tuple[Any, Any]:
    """A model with open gates around an LM."""
    options = {
        "resampler": {"depth": 1, "heads": 2, "head_dim": 8, "latents": 4},
        "cross_attention": {"heads": 2, "head_dim": 8, "gate_init": 0.7},
        "tokenizer": tiny.tokenizer(),
        "image_size": tiny.SIZE,
        **options,
    }
    return FlamingoForConditionalGeneration.from_backbones(tiny.vision(), lm, **options)


def distance(ours: Any, theirs: Any, inputs: Any) -> float:
    """Largest difference of the probabilities of two models."""
    with torch.no_grad():
        first, second = (m(**inputs).logits.float().softmax(-1) for m in (ours, theirs))
    return float((first - second).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_lm_in_16_bits(family: str, dtype: torch.dtype) -> None:
    """It stays as it is stored; what trains stays in float32 and is trained in it. On a CPU too."""
    reference, processor = around(tiny.lm(family))
    stored: Any = tiny.lm(family)
    model, _ = around(stored.to(dtype))
    assert {p.dtype for p in model.language_model.parameters()} == {dtype}
    assert {p.dtype for _, p in model.trainable_parameters()} == {torch.float32}
    inputs = dict(tiny.batch(processor))
    assert distance(model, reference, inputs) < 0.05
    assert model.generate(**inputs, max_new_tokens=3)[:, inputs["input_ids"].shape[1] :].shape == (3, 3)
    assert model.generate(**inputs, max_new_tokens=3, num_beams=2)[:, inputs["input_ids"].shape[1] :].shape == (3, 3)
    model.train()
    inputs = dict(tiny.batch(processor, padding_side="right"))
    model(**inputs, labels=tiny.labels_of(inputs, model.config.image_token_id)).loss.backward()
    unused = {"new_tokens", "resampler.frame_embeddings"}
    for name, parameter in model.trainable_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()) or name.split(".")[0] in unused, name


class Packed(nn.Module):
    """A linear layer in 8 bits with a scale a row, as quantising libraries make it: its weight is no float."""

    scale: torch.Tensor

    def __init__(self, full: Any) -> None:
        super().__init__()
        self.out_features, self.in_features = full.weight.shape
        scale = full.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        packed = (full.weight.detach() / scale).round().to(torch.int8).flatten()[:, None]
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.view(self.out_features, self.in_features) * self.scale
        return x @ weight.to(x.dtype).T


@pytest.mark.parametrize("head_too", [False, True])
def test_a_quantised_lm(head_too: bool) -> None:
    lm = tiny.lm("llama", tied=False)
    full, processor = around(tiny.lm("llama", tied=False))
    for name, module in list(lm.named_modules()):
        if isinstance(module, nn.Linear) and (head_too or name != "lm_head"):
            lm.set_submodule(name, Packed(module))
    model, _ = around(lm)
    assert lm.lm_head.weight.is_floating_point() != head_too
    assert table_shape(lm.lm_head) == (tiny.TOKENS, 32)
    assert (table_values(lm.lm_head) is None) == head_too
    inputs = tiny.batch(processor)
    with torch.no_grad():
        ours, theirs = (m(**inputs).logits[..., : tiny.TOKENS].softmax(-1) for m in (model, full))
    assert float((ours - theirs).abs().max()) < 0.05
    assert model.generate(**inputs, max_new_tokens=3)[:, inputs["input_ids"].shape[1] :].shape == (3, 3)
    model.train()
    inputs = dict(tiny.batch(processor, padding_side="right"))
    model(**inputs, labels=tiny.labels_of(inputs, model.config.image_token_id)).loss.backward()
    assert [name for name, p in model.trainable_parameters() if p.grad is None or not p.grad.any()] == []
    assert {p.dtype for name, p in model.language_model.named_parameters() if "proj" in name} == {torch.int8}


def test_a_device_map_is_kept() -> None:
    """Same tokens as without one; each block goes where its layer is."""
    plain, processor = around(tiny.lm("llama"))
    lm: Any = tiny.lm("llama")
    lm.hf_device_map = {"": "cpu"}  # what transformers leaves on a model that it has distributed
    model, _ = around(lm)
    assert model.language_model.hf_device_map == {"": "cpu"}
    inputs = tiny.batch(processor)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), plain.generate(**inputs, max_new_tokens=4))
    lm = tiny.lm("llama")
    lm.model.layers[3].to("meta")
    lm.hf_device_map = {"": "cpu", "model.layers.3": "meta"}
    model, _ = around(lm)
    assert [block.attn_gate.device.type for block in model.cross_attn_blocks.values()] == ["cpu", "cpu", "cpu", "meta"]


class Hidden(GPT2LMHeadModel):
    """Keeps its layers in pairs, so that no list is as long as their number."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers = self.transformer.h
        del self.transformer.h
        self.transformer.pairs = nn.ModuleList(nn.ModuleList(layers[i : i + 2]) for i in range(0, len(layers), 2))


def test_an_lm_without_a_decoder_stack() -> None:
    lm = Hidden(tiny.lm_config("gpt2"))
    with pytest.raises(UserError) as told:
        around(lm)
    sentence = str(told.value)
    assert "the decoder layers of Hidden were not found: it has no nn.ModuleList of 4 modules" in sentence
    assert "'transformer.pairs' (2)" in sentence
    assert "decoder_layers_path='...'" in sentence
    with pytest.raises(UserError, match=r"'transformer.wte' is a Embedding, not an nn.ModuleList"):
        around(lm, decoder_layers_path="transformer.wte")
    with pytest.raises(UserError, match=r"'transformer.pairs' has 2 modules, but the LM has 4 layers"):
        around(lm, decoder_layers_path="transformer.pairs")


def test_of_two_lists_of_one_length_the_layers_are_found() -> None:
    lm: Any = tiny_lm("llama")
    lm.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    assert find_decoder_layers(lm) is lm.model.layers
    assert find_decoder_layers(lm, "adapters") is lm.adapters


def test_a_config_without_a_number_of_layers() -> None:
    lm: Any = tiny.lm("llama")
    lm.config = PreTrainedConfig()
    with pytest.raises(UserError, match="PreTrainedConfig does not say how many layers the LM has"):
        around(lm)


def test_the_named_list_wins() -> None:
    lm: Any = tiny_lm("llama")
    lm.draft = copy.deepcopy(lm.model.layers)
    assert find_decoder_layers(lm) is lm.draft
    assert find_decoder_layers(lm, "model.layers") is lm.model.layers


def test_other_things_given_as_an_lm() -> None:
    with pytest.raises(UserError, match="is a Linear; a transformers causal LM is needed"):
        around(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"LlamaModel has no output embedding; give a causal LM"):
        around(tiny.lm("llama").model)
