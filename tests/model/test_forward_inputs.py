"""What `forward` takes and gives back beside ids and images, and peft's prompt learning through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from flamingo import UserError
from tests.model import tiny


@pytest.fixture
def built() -> tuple[Any, Any, dict[str, Any]]:
    model, processor = tiny.flamingo("llama")
    return model, processor, dict(tiny.batch(processor))


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> torch.Tensor:
    out: torch.Tensor = model(**inputs).logits
    return out


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "gemma2"])
def test_embeddings_instead_of_ids(family: str) -> None:
    model, processor = tiny.flamingo(family)
    inputs = dict(tiny.batch(processor))
    wanted = logits(model, **inputs)
    ids = inputs.pop("input_ids")
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(logits(model, inputs_embeds=embeddings, **inputs), wanted)
    torch.testing.assert_close(logits(model, inputs_embeds=embeddings, input_ids=ids, **inputs), wanted)
    phi = (ids == model.config.image_token_id).cumsum(1)
    torch.testing.assert_close(logits(model, inputs_embeds=embeddings, phi=phi, **inputs), wanted)


def test_embeddings_that_say_nothing_of_images(built: Any) -> None:
    model, _, inputs = built
    embeddings = torch.randn(3, inputs["input_ids"].shape[1], 32)
    mask = inputs["attention_mask"]
    assert logits(model, inputs_embeds=embeddings, attention_mask=mask).shape == (3, mask.shape[1], 262)
    images = {"pixel_values": inputs["pixel_values"], "image_counts": inputs["image_counts"]}
    with pytest.raises(UserError, match="row 0 has 0 <image> tags but 2 images"):
        logits(model, inputs_embeds=embeddings, attention_mask=mask, **images)
    with pytest.raises(UserError, match="both are of the same tokens"):
        logits(model, inputs_embeds=embeddings[:, 1:], **inputs)
    with pytest.raises(UserError, match="needs input_ids"):
        logits(model, attention_mask=mask)
    with pytest.raises(UserError, match=r"phi is \(3, 2\)"):
        logits(model, **inputs, phi=torch.zeros(3, 2, dtype=torch.long))


def test_tuples(built: Any) -> None:
    model, _, inputs = built
    out = model(**inputs)
    assert torch.equal(model(**inputs, return_dict=False)[0], out.logits)
    model.config.return_dict = False
    assert torch.equal(model(**inputs)[0], out.logits)
    assert torch.equal(model(**inputs, return_dict=True).logits, out.logits)


def test_arguments(built: Any) -> None:
    model, _, inputs = built
    wanted = logits(model, **inputs)
    with pytest.raises(UserError, match=r"no argument 'pixel_value', .* did you mean pixel_values"):
        model(**inputs, pixel_value=inputs["pixel_values"])
    length = inputs["input_ids"].shape[1]
    assert torch.equal(logits(model, **inputs, cache_position=torch.arange(length)), wanted)
    torch.testing.assert_close(logits(model, **inputs, logits_to_keep=2), wanted[:, -2:])
    torch.testing.assert_close(logits(model, **inputs, logits_to_keep=torch.tensor([1, 3])), wanted[:, [1, 3]])
    labels = tiny.labels_of(inputs, model.config.image_token_id)
    some, every = model(**inputs, labels=labels, logits_to_keep=2), model(**inputs, labels=labels)
    assert torch.equal(some.loss, every.loss)
    assert torch.equal(some.logits, every.logits[:, -2:])


def test_states_and_attentions(built: Any) -> None:
    model, _, inputs = built
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 5
    model.language_model.set_attn_implementation("eager")
    assert len(model(**inputs, output_attentions=True).attentions) == 4


TUNING = [PromptTuningConfig, PromptEncoderConfig]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("phi", [False, True])
@pytest.mark.parametrize("kind", TUNING, ids=lambda kind: str(kind.__name__))
def test_prompt_tuning(kind: Any, phi: bool, built: Any) -> None:
    """Virtual tokens whose embeddings are words' are those words in front of every row, which see no image."""
    model, processor, _ = built
    inputs = dict(tiny.batch(processor, padding_side="right"))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if phi:
        inputs["phi"] = (ids == model.config.image_token_id).cumsum(1)
    words = torch.tensor([60, 61, 62, 63])
    longer = {**inputs, "input_ids": torch.cat([words.expand(3, 4), ids], 1)}
    longer["attention_mask"] = torch.cat([torch.ones(3, 4, dtype=torch.long), mask], 1)
    if phi:
        longer["phi"] = torch.nn.functional.pad(inputs["phi"], (4, 0))
    wanted = logits(model, **longer)
    rows = model.get_input_embeddings().weight[words].detach().clone()
    peft = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
    peft.get_prompt = lambda batch_size, **_: rows.expand(batch_size, -1, -1)
    torch.testing.assert_close(logits(peft.eval(), **inputs), wanted)
    assert not torch.allclose(logits(peft, **{**inputs, "pixel_values": 255 - inputs["pixel_values"]}), wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*TUNING, PrefixTuningConfig], ids=lambda kind: str(kind.__name__))
def test_prompts_train_through_the_model(kind: Any, built: Any) -> None:
    model, processor, _ = built
    inputs = dict(tiny.batch(processor, padding_side="right"))
    peft = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    peft(**inputs, labels=tiny.labels_of(inputs, model.config.image_token_id)).loss.backward()
    trained = {name: p.grad for name, p in peft.named_parameters() if p.requires_grad}
    assert trained
    assert all(gradient is not None and bool(gradient.any()) for gradient in trained.values()), list(trained)
