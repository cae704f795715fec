"""`requires_grad` is the truth: who asks gets gradients, what nothing asks for costs nothing; the policy is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from flamingo import FlamingoForConditionalGeneration
from tests.model import tiny

POLICIES: list[dict[str, str]] = [
    {},
    {"vision": "train"},
    {"language": "train"},
    {"resampler": "frozen"},
    {"cross_attention": "frozen", "vision": "train"},
    dict.fromkeys(("vision", "language", "resampler", "cross_attention", "new_tokens"), "train"),
]


def step(model: Any, processor: Any, rows: list[int] | None = None) -> None:
    inputs = dict(tiny.batch(processor, rows, padding_side="right"))
    image = processor.image_token_id
    model(**inputs, labels=tiny.labels_of(inputs, image)).loss.backward()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_weight_that_trains_gets_a_gradient(policy: dict[str, str], tmp_path: Path) -> None:
    """With images, without any, with given features, without a label; and the policy is back after loading."""
    model, processor = tiny.flamingo("llama", tied=False)
    model.freeze(policy)
    model.train()
    inputs = dict(tiny.batch(processor, padding_side="right"))
    features = model.encode_media(inputs["pixel_values"]).detach()
    labels = tiny.labels_of(inputs, model.config.image_token_id)
    text = dict(tiny.batch(processor, [2]))
    without = {name: value for name, value in inputs.items() if name != "pixel_values"}
    for given in (
        {**inputs, "labels": labels},
        {**text, "labels": text["input_ids"]},
        {**without, "media_features": features, "labels": labels},
        {**inputs, "labels": torch.full_like(labels, -100)},
    ):
        model.zero_grad()
        model(**given).loss.backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad != (p.grad is not None)] == []
    model.save_pretrained(tmp_path)
    assert FlamingoForConditionalGeneration.from_pretrained(tmp_path).policy == model.policy


@pytest.mark.parametrize("recompute", [False, True])
def test_unfrozen_by_hand(recompute: bool) -> None:
    model, processor = tiny.flamingo("llama")
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": True})  # overruled
    encoder: Any = model.vision_encoder.tower
    layers = encoder.encoder.layers
    layer = layers[1]
    layer.requires_grad_(True)
    model.train()
    assert model.vision_encoder.training
    assert not model.language_model.model.embed_tokens.training
    step(model, processor)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert layers[0].mlp.fc1.weight.grad is None
    layer.requires_grad_(False)
    model.train()
    assert not model.vision_encoder.training


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_in_every_part(recompute: bool) -> None:
    model, processor = tiny.flamingo("llama")
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"]))
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": True})
    step(peft.train(), processor)
    dead = [
        n
        for n, p in peft.named_parameters()
        if p.requires_grad and (p.grad is None or ("lora_B" in n and not p.grad.any()))
    ]
    assert dead == []


def test_the_gradient_of_the_pixels() -> None:
    model, processor = tiny.flamingo("llama")
    inputs = dict(tiny.batch(processor))
    inputs["pixel_values"] = inputs["pixel_values"].float().div(127).sub(1).requires_grad_()
    model(**inputs).logits.sum().backward()
    assert inputs["pixel_values"].grad is not None
    assert bool(inputs["pixel_values"].grad.flatten(1).any(1).all())


def test_a_frozen_encoder_leaves_no_graph() -> None:
    model, processor = tiny.flamingo("llama")
    model.train()
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        tokens = model.vision_encoder(tiny.batch(processor)["pixel_values"])
    assert tokens.grad_fn is None
    assert saved == []


def test_dropout_rates_come_back_with_training() -> None:
    """Recomputing a frozen LM sets its layers' own rates to zero; unfrozen, it has them again."""
    model, _ = tiny.flamingo("opt")
    rates = [layer.dropout for layer in model.language_model.model.decoder.layers]
    model.activation_checkpointing_enable()
    model.train()
    assert {layer.dropout for layer in model.language_model.model.decoder.layers} == {0.0}
    model.freeze({"language": "train"})
    assert [layer.dropout for layer in model.language_model.model.decoder.layers] == rates


def _parallel(rank: int, file: str, found: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for policy in POLICIES:
        model, processor = tiny.flamingo("llama", tied=False)
        model.freeze(policy)
        parallel = DistributedDataParallel(model.train())
        for rows in ([[0, 1, 2], [2]], [[2], [0]], [[2], [2]]):  # of each process; row 2 has no image
            step(parallel, processor, rows[rank])
        found[rank, str(policy)] = float(sum(p.grad.double().sum() for p in model.parameters() if p.grad is not None))
    dist.destroy_process_group()


def test_plain_data_parallel_under_every_policy(tmp_path: Path) -> None:
    """Batches with and without images beside each other: nobody waits, and gradients are the same on both."""
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(_parallel, (str(tmp_path / "meet"), found), nprocs=2)
        for policy in POLICIES:
            assert found[0, str(policy)] == pytest.approx(found[1, str(policy)], rel=1e-9)
