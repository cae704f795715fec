"""Counted FLOPs against torch's own counter, for what is frozen, trained, recomputed and compiled."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from benchmarks.measure import counter
from flamingo.conformance.tiny_models import FAMILIES, document, subject, tiny_lm
from flamingo.layers.cross_attention import CrossAttention
from flamingo.layers.media_mask import segments_from_slots, slots_from_phi
from flamingo.layers.resampler import PerceiverAttention
from flamingo.training.distributed.fsdp import Processes, compile_layers, spawn
from flamingo.training.metrics.throughput import Flops, is_attention, peak_tflops
from flamingo.training.objectives.contrastive import ContrastiveObjective
from flamingo.training.objectives.flamingo import FlamingoObjective
from tests.training.world import CLIP


def torch_counts(work: Any) -> int:
    """torch's count, without the scores that an attention kernel computes again in backward: one product in five."""
    with counter() as counted:
        work()
    kinds = counted.get_flop_counts()["Global"]
    return sum(
        count * 4 // 5 if "attention" in str(kind) and "backward" in str(kind) else count
        for kind, count in kinds.items()
    )


def ours(model: nn.Module, work: Any) -> int:
    flops = Flops(model)
    work()
    found = flops.take()
    flops.close()
    return found


def batch_of(model: Any) -> dict[str, torch.Tensor]:
    """Two rows of one image each, whose first token it is: nothing is padded anywhere."""
    batch: Any = document(model, (0,))
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = model.config.image_token_id
    pixels = batch["pixel_values"][:1].repeat(2, 1, 1, 1, 1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": ids.clone()}
    return {**whole, "image_counts": torch.tensor([1, 1])}


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("language", ["frozen", "train"])
def test_a_step_is_what_torch_counts(family: str, language: str) -> None:
    """All products: encoder, resampler, blocks, the LM's layers and attention, its head; forward and backward."""
    model = subject(partial(tiny_lm, family))
    model.freeze({"language": language})
    model.train()
    batch = batch_of(model)

    def step() -> None:
        FlamingoObjective().sums(model, batch)["text"].backward()
        model.zero_grad()

    step()  # an LM is looked at once: whether its logits are what its head gives
    wanted = torch_counts(step)
    assert ours(model, step) == pytest.approx(wanted, rel=0.02)
    if language == "frozen":
        model.activation_checkpointing_enable()
        assert ours(model, step) == pytest.approx(wanted, rel=0.02)


def test_attention_alone_is_exact() -> None:
    torch.manual_seed(0)
    resample = PerceiverAttention(32, heads=2, head_dim=8)
    media, latents = torch.randn(3, 7, 32, requires_grad=True), torch.randn(3, 4, 32, requires_grad=True)
    look = CrossAttention(32, 16, heads=2, head_dim=8)
    segments = segments_from_slots(slots_from_phi(torch.tensor([[1] * 6, [1] * 6]), torch.tensor([[0], [1]])), 2)
    x, seen = torch.randn(12, 32, requires_grad=True), torch.randn(2, 4, 16, requires_grad=True)
    several = nn.MultiheadAttention(32, 4, batch_first=True)
    text = torch.randn(2, 9, 32, requires_grad=True)

    def all_of_them() -> torch.Tensor:
        update = look(x, look.project(seen), segments)
        return resample(media, latents).sum() + update.sum() + several(text, text, text, need_weights=False)[0].sum()

    parts = nn.ModuleList([resample, look, several])
    assert [is_attention(part) for part in parts] == [True, True, True]
    assert ours(parts, lambda: all_of_them().backward()) == torch_counts(lambda: all_of_them().backward())
    with torch.no_grad():
        forward = torch_counts(all_of_them)
        assert ours(parts, all_of_them) == forward
    # By hand: projections of latents, of patches and latents twice, and back; then 4 x 11 pairs twice, 16 wide.
    assert ours(resample, lambda: resample(media.detach(), latents.detach())) > 2 * 3 * 2 * 4 * 11 * 16


def test_two_towers_are_what_torch_counts() -> None:
    """Whose attention has its projections packed and calls no layer for them."""
    shape: dict[str, Any] = copy.deepcopy(CLIP)
    shape["text_cfg"]["vocab_size"] = 50
    model = open_clip.CLIP(**shape)
    model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))
    batch = {"image": torch.zeros(3, 3, 16, 16, dtype=torch.uint8), "text": torch.zeros(3, 8, dtype=torch.long)}

    def step() -> None:
        ContrastiveObjective().sums(model, batch)["pairs"].backward()

    assert ours(model, step) == pytest.approx(torch_counts(step), rel=0.02)


def _compiled(processes: Processes) -> None:
    """In a process of its own, without the tests' run-time checks of shapes, which torch.compile does not take."""
    model = subject(partial(tiny_lm, "llama"))
    model.train()
    batch = batch_of(model)

    def step() -> None:
        FlamingoObjective().sums(model, batch)["text"].backward()

    step()
    wanted = ours(model, step)
    compile_layers(FlamingoObjective().compiled_layers(model), backend="aot_eager")
    flops = Flops(model)
    step()
    first = flops.take()
    step()
    assert first == flops.take() == wanted
    flops.close()
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_compiled_layers_count_the_same_in_one_piece() -> None:
    """From outside: a hook inside would break the graph at every layer."""
    spawn(_compiled, 1)


def test_a_closed_counter_counts_no_more() -> None:
    model = subject(partial(tiny_lm, "gpt2"))
    flops = Flops(model)
    model(**document(model))
    assert flops.take() > 0
    assert flops.take() == 0
    flops.close()
    model(**document(model))
    assert flops.take() == 0


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_tflops(torch.device("cpu")) is None
