"""Adapters in the LM start as nothing, train alone and end in an ordinary model; a run may start from a folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.conformance.tiny_models import document, subject, tiny_lm
from flamingo.errors import UserError
from flamingo.training.objectives import lora
from tests.training.commands import losses, train_on
from tests.training.world import config, write_world
from train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gpt_neox", "mpt", "mosaic_gpt"])
def test_adapters_start_as_nothing_and_merge_into_an_ordinary_model(family: str, tmp_path: Path) -> None:
    model = subject(partial(tiny_lm, family))
    inputs: Any = document(model)
    before = model(**inputs).logits
    adapters = lora.add_adapters(model.language_model, rank=2, alpha=6.0)
    trained = [name for name, parameter in model.language_model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    torch.testing.assert_close(model(**inputs).logits, before)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in trained:
            model.language_model.get_parameter(name).normal_(std=0.1, generator=generator)
    adapted = model(**inputs).logits
    assert not torch.allclose(adapted, before, atol=1e-2)
    plain = subject(partial(tiny_lm, family))
    weights = lora.merge(model.state_dict(), {"language_model.": adapters})
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(**inputs).logits, adapted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_in_lm_and_gated_blocks_merge_together(family: str) -> None:
    """GPT-2's layers are transposed, and those of the blocks beside them are not."""
    model, plain = (subject(partial(tiny_lm, family)) for _ in range(2))
    model.requires_grad_(False)
    inputs: Any = document(model)
    before = model(**inputs).logits
    adapters = {
        "language_model.": lora.add_adapters(model.language_model, rank=2, alpha=6.0),
        "cross_attn_blocks.": lora.add_block_adapters(model.cross_attn_blocks, rank=3, alpha=2.0),
    }
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[0] + "." for name in trained} == set(adapters)
    torch.testing.assert_close(model(**inputs).logits, before)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).normal_(std=0.1, generator=generator)
    plain.load_state_dict(lora.merge(model.state_dict(), adapters))
    torch.testing.assert_close(plain(**inputs).logits, model(**inputs).logits, atol=2e-5, rtol=1e-4)
    with lora.without_adapters(model):
        torch.testing.assert_close(model(**inputs).logits, before)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in peft
def test_a_run_may_adapt_the_blocks_alone_or_beside_the_lm(world: Path, tmp_path: Path) -> None:
    for language in ("frozen", "lora"):
        for name, ends in (("whole", (3,)), ("parts", (1, 3))):
            for steps in ends:
                settings = config(world, tmp_path / f"{name}-{language}", "flamingo", steps=steps)
                settings.model.freeze.language = language
                settings.model.freeze.cross_attention = "lora"
                train(settings)
        assert losses(tmp_path / f"parts-{language}") == losses(tmp_path / f"whole-{language}")
        folder = tmp_path / f"whole-{language}" / "model"
        model = FlamingoForConditionalGeneration.from_pretrained(folder)
        assert not any("lora" in name for name, _ in model.named_parameters())
        assert (folder / lora.ADAPTER).exists() == (language == "lora")


def test_targets_are_chosen_by_name_and_a_wrong_one_is_named() -> None:
    lm = tiny_lm("llama")
    names = lora.linear_layers(lm, ["q_proj", "v_proj"])
    assert len(names) == 2 * lm.config.num_hidden_layers
    with pytest.raises(
        UserError, match=r"model\.lora\.targets: c_attn is not a linear layer .* have down_proj, gate_proj"
    ):
        lora.add_adapters(lm, rank=2, alpha=2.0, targets=["c_attn"])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in peft
def test_a_run_with_adapters_writes_a_model_that_needs_no_peft_and_the_adapters_beside_it(
    world: Path, tmp_path: Path
) -> None:
    train(config(world, tmp_path / "lm", "language", steps=1))
    settings = config(world, tmp_path / "run", "flamingo", steps=4)
    settings.model.language.name = str(tmp_path / "lm" / "model")
    settings.model.freeze.language = "lora"
    settings.model.lora.rank = 4
    settings.optim.lr_factors.language = 10.0
    train(settings)
    model = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    assert not any("lora" in name for name, _ in model.named_parameters())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "lm" / "model")
    ids = torch.tensor([[3, 4, 5, 6]])
    merged = model.language_model(input_ids=ids).logits
    assert not torch.allclose(base(input_ids=ids).logits, merged, atol=1e-4)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "model" / lora.ADAPTER)
    torch.testing.assert_close(adapted(input_ids=ids).logits, merged, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in peft
def test_a_language_run_with_adapters_writes_both_and_resumes(world: Path, tmp_path: Path, family: str) -> None:
    """GPT-2's head is tied to its embedding, and its layers are transposed."""
    first = config(world, tmp_path / "lm", "language", steps=1)
    if family == "gpt2":
        first.model.language.config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    train(first)
    for name, ends in (("whole", (4,)), ("parts", (2, 4))):
        for steps in ends:
            settings = config(world, tmp_path / name, "language", steps=steps, activation_checkpointing=True)
            settings.model.language.config = None
            settings.model.language.name = str(tmp_path / "lm" / "model")
            settings.model.freeze.language = "lora"
            train(settings)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    base, merged = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("lm", "whole"))
    assert not any("lora" in name for name, _ in merged.named_parameters())
    tables = [model.get_input_embeddings().state_dict()["weight"] for model in (base, merged)]
    assert torch.equal(*tables)
    ids = torch.tensor([[3, 4, 5, 6]])
    after = merged(input_ids=ids).logits
    assert not torch.allclose(base(input_ids=ids).logits, after, atol=1e-4)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "whole" / "model" / lora.ADAPTER)
    torch.testing.assert_close(adapted(input_ids=ids).logits, after, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_of_a_language_run_on_two_processes(world: Path, tmp_path: Path) -> None:
    train(config(world, tmp_path / "lm", "language", steps=1))
    for size in (1, 2):
        settings = config(world, tmp_path / f"run-{size}", "language", steps=3)
        settings.model.language.config = None
        settings.model.language.name = str(tmp_path / "lm" / "model")
        settings.model.freeze.language = "lora"
        train_on(size, settings)
    assert losses(tmp_path / "run-2") == pytest.approx(losses(tmp_path / "run-1"), abs=1e-5)


def test_adapters_resume_bit_for_bit(world: Path, tmp_path: Path) -> None:
    for name, ends in (("whole", (4,)), ("parts", (2, 4))):
        for steps in ends:
            settings = config(world, tmp_path / name, "flamingo", steps=steps)
            settings.model.freeze.language = "lora"
            train(settings)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_starts_from_a_folder(world: Path, tmp_path: Path) -> None:
    train(config(world, tmp_path / "first", "flamingo", steps=6))
    settings = config(world, tmp_path / "second", "flamingo", steps=1)
    settings.model.init = str(tmp_path / "first" / "model")
    settings.model.vision.config = settings.model.language.config = settings.model.language.tokenizer = None
    settings.optim.lr = 1e-9
    train(settings)
    first, second = (
        FlamingoForConditionalGeneration.from_pretrained(tmp_path / name / "model") for name in ("first", "second")
    )
    for name, value in first.named_parameters():
        torch.testing.assert_close(second.get_parameter(name), value, atol=1e-6, rtol=0)
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "first")[0]
    assert (
        FlamingoProcessor.from_pretrained(tmp_path / "second" / "model").image_token_id == first.config.image_token_id
    )


def test_frozen_bf16_beside_trained_fp32_is_written_and_read_without_rounding(world: Path, tmp_path: Path) -> None:
    train(config(world, tmp_path, "flamingo", steps=2, precision="bf16"))
    model = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "model")
    for name, value in model.named_parameters():
        trained = model.policy[model.part_of(name)] == "train"
        assert value.dtype == (torch.float32 if trained else torch.bfloat16), name
    block = model.resampler.layers[0].attn.q_proj.weight
    assert not torch.equal(block, block.bfloat16().float())
