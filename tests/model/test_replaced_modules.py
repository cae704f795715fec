"""What runs is what hangs in the module tree when a call begins: replaced, wrapped and shared modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from flamingo import UserError
from flamingo.layers.resampler import PerceiverResampler
from tests.model import tiny


class Wrapper(nn.Module):
    """What a user puts around a module; counts how often it runs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)


@pytest.fixture
def built() -> tuple[Any, Any, Any, Tensor]:
    """A model, its processor, inputs and the logits for them."""
    model, processor = tiny.flamingo("llama")
    inputs = dict(tiny.batch(processor))
    return model, processor, inputs, logits(model, inputs)


@torch.no_grad()
def logits(model: Any, inputs: Any) -> Tensor:
    out: Tensor = model(**inputs).logits
    return out


def rewrapped(model: Any) -> None:
    model.language_model = copy.deepcopy(model.language_model)


def same_layers(model: Any) -> None:
    model.language_model.model.layers = copy.deepcopy(model.language_model.model.layers)


def same_tables(model: Any) -> None:
    model.set_input_embeddings(copy.deepcopy(model.get_input_embeddings()))
    model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))


def fresh_tables(model: Any) -> None:
    """Modules that never had a hook."""
    old_table, old_head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    table, head = nn.Embedding(*old_table.shape), nn.Linear(old_head.shape[1], old_head.shape[0], bias=False)
    table.weight, head.weight = old_table, old_head
    model.language_model.set_input_embeddings(table)
    model.language_model.lm_head = head


def through_pickle(model: Any) -> None:
    model.language_model = pickle.loads(pickle.dumps(model.language_model))


def wrapped_layers(model: Any) -> None:
    layers = model.language_model.model.layers
    for index in range(len(layers)):
        layers[index] = Wrapper(layers[index])


def wrapped_blocks(model: Any) -> None:
    for key in model.cross_attn_blocks:
        model.cross_attn_blocks[key] = Wrapper(model.cross_attn_blocks[key])


def compiled_layer(model: Any) -> None:
    layers = model.language_model.model.layers
    layers[1] = torch.compile(layers[1], backend="eager")


def lora_around_the_lm(model: Any) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens", "lm_head"])
    model.language_model = get_peft_model(model.language_model, config)


def lora_around_the_model(model: Any) -> None:
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))


def saved_modules(model: Any) -> None:
    parts = ["new_tokens", "resampler", "vision_encoder", "embed_tokens", "lm_head", "cross_attn_blocks.1"]
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=parts))


ALIKE: list[Callable[[Any], None]] = [
    rewrapped,
    same_layers,
    same_tables,
    fresh_tables,
    through_pickle,
    wrapped_layers,
    wrapped_blocks,
    compiled_layer,
    lora_around_the_lm,
    lora_around_the_model,
    saved_modules,
]


@pytest.mark.filterwarnings("ignore")  # of peft about tied tables and deprecated names
@pytest.mark.parametrize("change", ALIKE, ids=lambda change: str(change.__name__))
def test_an_equal_module_in_its_place_changes_nothing(change: Any, built: Any) -> None:
    model, _, inputs, before = built
    change(model)
    model.eval()
    torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=1e-5)
    inputs["pixel_values"] = 255 - inputs["pixel_values"]
    assert float((logits(model, inputs) - before).abs().max()) > 1e-3
    if change in (wrapped_layers, wrapped_blocks):
        assert {m.calls for m in model.modules() if isinstance(m, Wrapper)} == {2}


def test_generation_and_scores_after_a_replacement(built: Any) -> None:
    model, processor, inputs, _ = built
    wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    candidates = [processor.encode_text(" cat"), processor.encode_text(" dog")]
    scores = model.score_candidates(inputs, candidates)
    rewrapped(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), wanted)
    torch.testing.assert_close(model.score_candidates(inputs, candidates), scores)


def test_the_replacement_is_what_trains(built: Any) -> None:
    """A copied LM with recomputation on: its gradients are those of the model that was built so."""
    model, processor, _, _ = built
    model.freeze({"language": "train"})
    model.activation_checkpointing_enable()
    old = model.language_model
    rewrapped(model)
    assert model.language_model is not old
    model.train()
    inputs = dict(tiny.batch(processor, padding_side="right"))
    model(**inputs, labels=tiny.labels_of(inputs, model.config.image_token_id)).loss.backward()
    assert all(p.grad is None for p in old.parameters())
    assert [name for name, p in model.trainable_parameters() if p.grad is None] == []


def test_two_models_share_a_language_model() -> None:
    """Each call runs the blocks of the model that was called, once, whichever was built last."""
    lm = tiny.lm("llama")
    options: dict[str, Any] = {"image_size": tiny.SIZE, "tokenizer": tiny.tokenizer()}
    options["cross_attention"] = {"heads": 2, "head_dim": 8, "gate_init": 0.7}
    make = tiny.FlamingoForConditionalGeneration.from_backbones
    alone, processor = make(tiny.vision(), tiny.lm("llama"), seed=1, **options)
    first, _ = make(tiny.vision(), lm, seed=1, **options)
    inputs = tiny.batch(processor)
    wanted = logits(alone, inputs)
    assert torch.equal(logits(first, inputs), wanted)
    second, _ = make(tiny.vision(), lm, seed=2, **options)
    other = logits(second, inputs)
    assert not torch.equal(other, wanted)
    assert torch.equal(logits(first, inputs), wanted)
    del second
    assert torch.equal(logits(first, inputs), wanted)


def test_a_replaced_block_runs(built: Any) -> None:
    model, _, inputs, before = built

    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, media: Tensor, **options: Any) -> Tensor:
            return x + self.scale

    for key in model.cross_attn_blocks:
        model.cross_attn_blocks[key] = Silent()
    without = logits(model, inputs)
    assert not torch.allclose(without, before)
    inputs["pixel_values"] = 255 - inputs["pixel_values"]
    assert torch.equal(logits(model, inputs), without)


def test_a_lm_of_another_kind_is_adopted(built: Any) -> None:
    """Same width, vocabulary and depth, another family: config and derived facts follow, and it is saved as it is."""
    model, _, inputs, before = built
    model.language_model = tiny.lm("gpt2")
    reference, _ = tiny.flamingo("gpt2")
    reference.new_tokens, reference.resampler = model.new_tokens, model.resampler
    reference.cross_attn_blocks = model.cross_attn_blocks
    now = logits(model, inputs)
    assert not torch.allclose(now, before)
    torch.testing.assert_close(now, logits(reference, inputs))
    assert model.config.text_config.model_type == "gpt2"


def replaced_lm(config: dict[str, Any]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        described = tiny.lm_config("llama", config.pop("vocab", tiny.TOKENS))
        described.update(config)
        model.language_model = tiny.AutoModelForCausalLM.from_config(described)

    return change


def tokens_of_another_width(model: Any) -> None:
    model.set_input_embeddings(nn.Embedding(tiny.TOKENS, 16))


def head_with_a_gap(model: Any) -> None:
    model.set_output_embeddings(nn.Linear(32, tiny.TOKENS - 9, bias=False))


def another_resampler(model: Any) -> None:
    model.resampler = PerceiverResampler(48, depth=1, heads=2, head_dim=8, latents=4)


def no_lm(model: Any) -> None:
    model.language_model = nn.Linear(32, 32)


def prompt_tuning_inside(model: Any) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model.language_model = get_peft_model(model.language_model, config)


def bypassed_layer(model: Any) -> None:
    lm = model.language_model
    inner = lm.model
    lm.model.layers = nn.ModuleList(lm.model.layers)
    stack = list(inner.layers)
    lm.model.register_module("spare", copy.deepcopy(inner.layers))
    model.config.decoder_layers_path = "model.spare"  # a list that hangs in the tree and never runs
    assert len(stack) == 4


REFUSED: list[tuple[Callable[[Any], None], str]] = [
    (replaced_lm({"hidden_size": 16, "intermediate_size": 16, "head_dim": 4}), "16 wide, but the rows of the new"),
    (replaced_lm({"num_hidden_layers": 2}), "has 2 decoder layers, but there is a gated block for layer 3"),
    (replaced_lm({"vocab": tiny.TOKENS + 40}), r"new tokens' ids \[259, 260, 261\] would hide words"),
    (replaced_lm({"vocab": tiny.TOKENS - 40}), "leave a gap behind the 219 rows"),
    (tokens_of_another_width, "input embedding of LlamaForCausalLM is 16 wide"),
    (head_with_a_gap, "leave a gap behind the 250 rows"),
    (another_resampler, "latents 48 wide, but the gated block of layer 1 takes 24"),
    (no_lm, "language_model is a Linear; a causal LM"),
    (prompt_tuning_inside, r"get_peft_model\(model, ...\)"),
    (bypassed_layer, "ran, but not the decoder layers 1, 3"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("change", "sentence"), REFUSED, ids=[sentence[:24] for _, sentence in REFUSED])
def test_what_does_not_fit_is_refused_at_the_next_call(change: Any, sentence: str, built: Any) -> None:
    model, _, inputs, _ = built
    change(model)
    with pytest.raises(UserError, match=sentence):
        logits(model, inputs)


@pytest.mark.filterwarnings("ignore")
def test_adapters_go_on_and_off(built: Any) -> None:
    """Merging and unloading gives back plain modules, and they run."""
    model, _, inputs, before = built
    peft: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["new_tokens"]))
    with torch.no_grad():
        peft.base_model.model.new_tokens.modules_to_save["default"].input_rows.mul_(3)
    changed = logits(peft.eval(), inputs)
    assert not torch.allclose(changed, before)
    with peft.disable_adapter():
        torch.testing.assert_close(logits(peft, inputs), before)
    merged = peft.merge_and_unload()
    assert type(merged) is type(model)
    torch.testing.assert_close(logits(merged.eval(), inputs), changed)
