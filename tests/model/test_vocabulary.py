"""The vocabulary as of any causal LM: resizing, tables and heads, ids that have no row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from flamingo import FlamingoForConditionalGeneration, UserError
from tests.model import tiny

TOKENS = tiny.TOKENS


@torch.no_grad()
def logits(model: Any, inputs: Any) -> torch.Tensor:
    out: torch.Tensor = model(**inputs).logits
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mean_resizing", [True, False])
def test_resized_saved_loaded(family: str, tied: bool, mean_resizing: bool, tmp_path: Path) -> None:
    """The new tokens keep their rows, old logits stay, and everything else works with the added ids."""
    model, processor = tiny.flamingo(family, tied=tied)
    inputs = dict(tiny.batch(processor))
    before = logits(model, inputs)
    rows = {name: value.detach().clone() for name, value in model.new_tokens.named_parameters()}
    processor.tokenizer.add_tokens(["<box>", "<point>"])
    size = len(processor.tokenizer)
    assert size == TOKENS + 3 + 2
    table = model.resize_token_embeddings(size, mean_resizing=mean_resizing)
    assert table is model.get_input_embeddings()
    assert table.num_embeddings == size
    assert model.get_output_embeddings().out_features == size
    assert (model.get_output_embeddings().weight is table.weight) == tied
    assert model.config.text_config.vocab_size == model.vocab_size == size
    torch.testing.assert_close(logits(model, inputs)[..., : TOKENS + 3], before, rtol=0, atol=1e-5)
    for name, value in model.new_tokens.named_parameters():
        assert torch.equal(value, rows[name])
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 100, size - 1)
    model.save_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert logits(model, inputs).shape[-1] == size
    ours = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(ours, loaded.generate(**inputs, max_new_tokens=3, do_sample=False))
    answers = [[size - 1], [size - 2, 40]]
    assert bool(model.score_candidates(inputs, answers).isfinite().all())


def test_padding_to_a_multiple_and_down_again() -> None:
    model, processor = tiny.flamingo("llama", tied=False)
    before = logits(model, inputs := tiny.batch(processor))
    assert model.resize_token_embeddings(pad_to_multiple_of=64).num_embeddings == 320
    assert model.resize_token_embeddings(TOKENS + 3).num_embeddings == TOKENS + 3
    torch.testing.assert_close(logits(model, inputs), before)
    with pytest.raises(UserError, match=f"in front of the new token {TOKENS + 2}; {TOKENS + 3} is the least"):
        model.resize_token_embeddings(TOKENS + 1)
    with pytest.raises(UserError, match="in front of the new token"):
        model.resize_token_embeddings(100)
    torch.testing.assert_close(logits(model, inputs), before)


def test_the_lms_own_resizing_is_followed_too() -> None:
    model, processor = tiny.flamingo("llama")
    before = logits(model, inputs := tiny.batch(processor))
    model.language_model.resize_token_embeddings(TOKENS + 20)
    torch.testing.assert_close(logits(model, inputs)[..., : TOKENS + 3], before)
    assert model.config.text_config.vocab_size == TOKENS + 20
    model.language_model.resize_token_embeddings(TOKENS - 20)
    with pytest.raises(UserError, match="leave a gap"):
        logits(model, inputs)


def test_ids_without_a_row() -> None:
    model, processor = tiny.flamingo("llama")
    processor.tokenizer.add_tokens(["<box>"])
    inputs = dict(tiny.batch(processor, [2]))
    inputs["input_ids"][0, -1] = TOKENS + 3
    with pytest.raises(UserError, match=r"has the id 262, .*resize_token_embeddings\(len\(tokenizer\)\)"):
        logits(model, inputs)
    with pytest.raises(UserError, match="has the id 262"):
        model.generate(**inputs, max_new_tokens=2)
    model.resize_token_embeddings(len(processor.tokenizer))
    logits(model, inputs)
    inputs["input_ids"][0, -1] = -100
    with pytest.raises(UserError, match="has the id -100"):
        logits(model, inputs)


def test_tokens_added_before_building() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<box>"])
    with pytest.raises(UserError, match=r"leave a gap behind the 259 rows.*on the LM before"):
        tiny.flamingo("llama", tokenizer=tokenizer)
    model, processor = tiny.flamingo("llama", vocab=len(tokenizer), tokenizer=tokenizer)
    logits(model, tiny.batch(processor))


@pytest.mark.parametrize("tied", [True, False])
def test_tying_again(tied: bool) -> None:
    model, processor = tiny.flamingo("llama", tied=tied)
    before = logits(model, inputs := tiny.batch(processor))
    model.tie_weights()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("vocab", [TOKENS, TOKENS + 20], ids=["beyond", "inside"])
def test_the_table_gives_the_new_tokens_rows(vocab: int) -> None:
    model, processor = tiny.flamingo("llama", vocab=vocab)
    inputs = tiny.batch(processor)
    rows = model.get_input_embeddings()(inputs["input_ids"])
    image = inputs["input_ids"] == model.config.image_token_id
    assert torch.equal(
        rows[image][0], model.new_tokens.input_rows[model.new_tokens.ids.index(processor.image_token_id)]
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_all_linear_leaves_the_head_out(family: str) -> None:
    model, _ = tiny.flamingo(family, tied=False)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    adapted = {name.split(".lora_")[0] for name, _ in peft.named_parameters() if ".lora_" in name}
    assert not [name for name in adapted if name.endswith(("lm_head", "embed_out"))]
    assert any("language_model" in name for name in adapted)
