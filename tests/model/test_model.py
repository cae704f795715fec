"""Equalities of the whole model, on every verified LM family."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.model import tiny

families = pytest.mark.parametrize("family", tiny.FAMILIES)
text_rows = torch.tensor([[1, 40, 41, 42, 43], [1, 50, 51, 52, 53]])


@families
def test_closed_gates_are_the_frozen_lm_exactly(family: str) -> None:
    model, processor = tiny.flamingo(family, gates=0.0)
    inputs = tiny.batch(processor)
    with torch.no_grad():
        ours = model(**inputs, use_cache=False).logits[..., : tiny.TOKENS]
        plain = tiny.lm(family)
        # The new tokens' embeddings are not the LM's; give it the same input by its embeddings.
        embedded = plain.get_input_embeddings()(inputs["input_ids"].clamp(max=tiny.TOKENS - 1))
        embedded = model.new_tokens(embedded, model.new_tokens.match(inputs["input_ids"]))
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        theirs = plain(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False).logits
        assert torch.equal(ours, theirs)
        assert torch.equal(
            model(input_ids=text_rows, image_counts=torch.tensor([0, 0])).logits[..., : tiny.TOKENS],
            plain(input_ids=text_rows).logits,
        )


@families
def test_the_lm_stays_an_ordinary_lm(family: str, tmp_path: Path) -> None:
    """Same class, same state dict, loadable by transformers, and outside of a call the same function."""
    model, processor = tiny.flamingo(family)
    plain = tiny.lm(family)
    model(**tiny.batch(processor))
    lm = model.language_model
    assert type(lm) is type(plain)
    assert list(lm.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(lm(input_ids=text_rows).logits, plain(input_ids=text_rows).logits)
    lm.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=text_rows).logits, plain(input_ids=text_rows).logits)


@families
def test_changing_a_image_changes_only_what_may_see_it_and_follows(family: str) -> None:
    model, processor = tiny.flamingo(family)
    inputs = tiny.batch(processor, [0])
    with torch.no_grad():
        before = model(**inputs).logits[0]
        inputs["pixel_values"][1] = tiny.picture(99)
        after = model(**inputs).logits[0]
    second = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[1, 0]
    changed = (before != after).any(-1)
    assert not changed[:second].any()
    assert changed[second:].all()


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_depend_on_its_batch_mates(family: str, side: str) -> None:
    model, processor = tiny.flamingo(family)
    with torch.no_grad():
        whole = tiny.batch(processor, padding_side=side)
        together = model(**whole).logits
        for row in range(3):
            alone = model(**tiny.batch(processor, [row])).logits[0]
            mine = together[row][whole["attention_mask"][row].bool()]
            torch.testing.assert_close(mine, alone, rtol=0, atol=2e-5)


@families
def test_cached_is_uncached(family: str) -> None:
    """Token by token with the cache alone: it remembers the images, and how many have come."""
    model, processor = tiny.flamingo(family)
    inputs = tiny.batch(processor)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    prompt = ids.shape[1] - 4  # the third row's padding and all second images lie before
    counts = inputs["image_counts"]
    with torch.no_grad():
        full = model(**inputs, use_cache=False).logits
        images = {"pixel_values": inputs["pixel_values"], "image_counts": counts}
        out = model(input_ids=ids[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True, **images)
        for t in range(prompt, ids.shape[1]):
            out = model(
                input_ids=ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=out.past_key_values
            )
            torch.testing.assert_close(out.logits[:, 0], full[:, t], rtol=0, atol=2e-5)


def test_a_later_turn_brings_new_images() -> None:
    """Images given with a cache are numbered on, in rows that had different numbers before."""
    model, processor = tiny.flamingo()
    first = processor(images=[[tiny.picture(1), tiny.picture(2)], []], text=["<image>a<image>b", "plain text"[:4]])
    image = model.config.image_token_id
    turn = torch.tensor([[image, 60, 61], [62, image, 63]])
    pixels = torch.stack([tiny.picture(3), tiny.picture(4)])[:, None]
    mask = torch.cat([first["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
    with torch.no_grad():
        start = model(**first, use_cache=True)
        ours = model(
            input_ids=turn,
            attention_mask=mask,
            past_key_values=start.past_key_values,
            pixel_values=pixels,
            image_counts=torch.tensor([1, 1]),
        ).logits
        together = torch.cat([first["pixel_values"], pixels])[[0, 1, 2, 3]]
        full = model(
            input_ids=torch.cat([first["input_ids"], turn], 1),
            attention_mask=mask,
            pixel_values=together,
            image_counts=torch.tensor([3, 1]),
        ).logits
    torch.testing.assert_close(ours, full[:, -3:], rtol=0, atol=2e-5)


@families
def test_loss_over_labelled_positions_is_the_loss_over_all(family: str) -> None:
    model, processor = tiny.flamingo(family)
    inputs = dict(tiny.batch(processor, padding_side="right"))
    labels = tiny.labels_of(inputs, model.config.image_token_id)
    out = model(**inputs, labels=labels)
    lean = model(**inputs, labels=labels, skip_logits=True)
    assert lean.logits is None
    torch.testing.assert_close(out.loss, lean.loss)
    logits = out.logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    picked = logits.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    by_hand = -(picked * (targets != -100)).sum()
    torch.testing.assert_close(out.loss, by_hand / (targets != -100).sum())
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=7).loss, by_hand / 7)


@families
def test_only_what_trains_gets_gradients(family: str) -> None:
    model, processor = tiny.flamingo(family)
    inputs = dict(tiny.batch(processor, padding_side="right"))
    model.train()
    model(**inputs, labels=tiny.labels_of(inputs, model.config.image_token_id)).loss.backward()
    for name, parameter in model.named_parameters():
        trains = model.part_of(name) in ("resampler", "cross_attention", "new_tokens")
        assert parameter.requires_grad == trains, name
        assert (parameter.grad is not None) == trains, name
        if trains and "frame_embeddings" not in name:
            assert bool(parameter.grad.abs().sum() > 0), name  # type: ignore[union-attr]
    assert not model.language_model.training
    assert not model.vision_encoder.training


def test_a_batch_without_images_gives_zero_gradients_for_the_same_parameters() -> None:
    """Else processes of a sharded run would wait for one another for ever."""
    model, _ = tiny.flamingo()
    model.train()
    counts = torch.tensor([0, 0])
    out = model(input_ids=text_rows, image_counts=counts, labels=text_rows)
    out.loss.backward()
    missing = [name for name, p in model.trainable_parameters() if p.grad is None]
    assert missing == []
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(model(input_ids=text_rows, image_counts=counts, labels=text_rows).loss, out.loss)


def test_recomputation_changes_nothing() -> None:
    for family in tiny.FAMILIES:
        gradients = []
        for recompute in (False, True):
            model, processor = tiny.flamingo(family)
            if recompute:
                model.activation_checkpointing_enable()
            model.train()
            inputs = dict(tiny.batch(processor, padding_side="right"))
            model(**inputs, labels=tiny.labels_of(inputs, model.config.image_token_id)).loss.backward()
            gradients.append({name: p.grad for name, p in model.trainable_parameters()})
            recomputed = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.training]
            assert len(recomputed) == (4 if recompute else 0) + 2 + 2  # LM layers, blocks, resampler layers
            assert all(m.gradient_checkpointing == recompute for m in recomputed)
        torch.testing.assert_close(*gradients)


def test_mask_ffn_without_media_makes_a_text_row_the_frozen_lm() -> None:
    model, _ = tiny.flamingo(cross_attention={"heads": 2, "head_dim": 8, "mask_ffn_without_media": True})
    with torch.no_grad():
        ours = model(input_ids=text_rows, image_counts=torch.tensor([0, 0])).logits[..., : tiny.TOKENS]
        assert torch.equal(ours, tiny.lm("llama")(input_ids=text_rows).logits)


def test_explicit_phi_wins() -> None:
    model, processor = tiny.flamingo()
    inputs = dict(tiny.batch(processor, [0]))
    phi = torch.zeros_like(inputs["input_ids"])
    with torch.no_grad():
        none = model(**inputs, phi=phi).logits
        inputs["pixel_values"] = inputs["pixel_values"].flip(0)
        assert torch.equal(none, model(**inputs, phi=phi).logits)
        assert not torch.equal(none, model(**inputs).logits)


def test_a_copy_is_independent() -> None:
    model, processor = tiny.flamingo()
    inputs = tiny.batch(processor)
    with torch.no_grad():
        before = model(**inputs).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs).logits, before)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(**inputs).logits, before)
