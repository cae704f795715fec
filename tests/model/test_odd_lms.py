"""Language models that are stored in an unusual way, and those that cannot be used: one sentence each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from flamingo import FlamingoForConditionalGeneration, UserError
from flamingo.families import tiny_lm
from flamingo.language import find_decoder_layers
from flamingo.tables import table_shape, table_values
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
    model, _ = around(tiny.lm(family).to(dtype))
    assert {p.dtype for p in model.language_model.parameters()} == {dtype}
    assert {p.dtype for _, p in model.trainable_parameters()} == {torch.float32}
    inputs = dict(tiny.batch(processor))
    assert distance(model, reference, inputs) < 0.05
    assert model.generate(**inputs, max_new_tokens=3).shape == (3, 3)
    assert model.generate(**inputs, max_new_tokens=3, num_beams=2).shape == (3, 3)
    model.train()
    inputs = dict(tiny.batch(processor, padding_side="right"))
    model(**inputs, labels=tiny.labels_of(inputs, model.config.image_token_id)).loss.backward()
    unused = {"new_tokens", "resampler.frame_embeddings"}
    for name, parameter in model.trainable_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()) or name.split(".")[0] in unused, name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("head_too", [False, True])
def test_a_quantised_lm(head_too: bool) -> None:
    """Layers with packed weights, the head's as well: torch's own int8, since no other package is needed for it."""
    lm = tiny.lm("llama", tied=False)
    full, processor = around(tiny.lm("llama", tied=False))
    parts = lm if head_too else lm.model
    torch.ao.quantization.quantize_dynamic(parts, {nn.Linear}, dtype=torch.qint8, inplace=True)
    assert callable(lm.model.layers[0].mlp.up_proj.weight)
    assert callable(lm.lm_head.weight) == head_too
    model, _ = around(lm)
    inputs = tiny.batch(processor)
    assert distance(model, full, inputs) < 0.2
    assert model.generate(**inputs, max_new_tokens=3).shape == (3, 3)
    rows = model.new_tokens.output_rows
    torch.testing.assert_close(rows, full.new_tokens.output_rows, rtol=0, atol=0.02)
    model.train()
    inputs = dict(tiny.batch(processor, padding_side="right"))
    trained = model(**inputs).logits.float().logsumexp(-1).mean()
    with torch.no_grad():  # torch's int8 has no backward, so training through it is another package's matter
        assert bool(trained.isfinite())


def test_a_packed_table_that_cannot_be_read() -> None:
    """As 4-bit layers are: two values a byte, in one column; their shape is known all the same."""

    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(32, 64, bias=False)
            self.weight = nn.Parameter(torch.zeros(1024, 1, dtype=torch.uint8), requires_grad=False)

    assert table_shape(Packed()) == (64, 32)
    assert table_values(Packed()) is None


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
