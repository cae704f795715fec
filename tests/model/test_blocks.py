"""Resampler and gated block against a second implementation, written from the formulas alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from flamingo.errors import UserError
from flamingo.layers.cross_attention import GatedCrossAttentionBlock
from flamingo.layers.media_mask import image_table, segments_from_slots, slots_from_phi
from flamingo.layers.resampler import PerceiverResampler

Weights = Mapping[str, Tensor]


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def mlp(x: Tensor, w: Weights, name: str) -> Tensor:
    up = norm(x, w, f"{name}.norm") @ w[f"{name}.up_proj.weight"].T
    gelu = up * 0.5 * (1 + torch.erf(up / 2**0.5))
    return gelu @ w[f"{name}.down_proj.weight"].T


def project(x: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    return (x @ w[f"{name}.weight"].T).unflatten(-1, (heads, -1))


def slow_resampler(x: Tensor, w: Weights, depth: int, heads: int) -> Tensor:
    frames = x.shape[1]
    media = (x + w["frame_embeddings"][:frames, None]).flatten(1, 2)
    latents = w["latents"].expand(len(x), -1, -1)
    for p in range(depth):
        a = f"layers.{p}.attn"
        ln = norm(latents, w, f"{a}.norm_latents")
        both = torch.cat([norm(media, w, f"{a}.norm_media"), ln], dim=1)
        q, k, v = (project(y, w, f"{a}.{n}_proj", heads) for y, n in ((ln, "q"), (both, "k"), (both, "v")))
        sim = torch.einsum("iqhk,inhk->ihqn", q * q.shape[-1] ** -0.5, k)
        out = torch.einsum("ihqn,inhk->iqhk", sim.softmax(-1), v).flatten(-2)
        latents = latents + out @ w[f"{a}.o_proj.weight"].T
        latents = latents + mlp(latents, w, f"layers.{p}.mlp")
    return norm(latents, w, "norm")


def slow_block(x: Tensor, media: list[Tensor], phi: Tensor, w: Weights, heads: int, mask_ffn: bool) -> Tensor:
    """Row by row and with a dense mask; `media[b]` is (M, L, E)."""
    rows = []
    for b in range(len(x)):
        attended = torch.zeros_like(x[b])
        if len(media[b]):
            q = project(norm(x[b], w, "attn.norm"), w, "attn.q_proj", heads)
            k, v = (project(media[b].flatten(0, 1), w, f"attn.{n}_proj", heads) for n in "kv")
            sim = torch.einsum("thk,nhk->htn", q * q.shape[-1] ** -0.5, k)
            owner = torch.arange(1, len(media[b]) + 1).repeat_interleave(media[b].shape[1])
            seen = phi[b][:, None] == owner
            weights = sim.masked_fill(~seen, -1e30).softmax(-1) * seen.any(-1)[:, None]
            attended = torch.einsum("htn,nhk->thk", weights, v).flatten(-2) @ w["attn.o_proj.weight"].T
        y = x[b] + w["attn_gate"].tanh() * attended
        update = w["ff_gate"].tanh() * mlp(y, w, "mlp")
        rows.append(y + (update * (phi[b] > 0)[:, None] if mask_ffn else update))
    return torch.stack(rows)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.double()


def same_with_gradients(module: torch.nn.Module, fast: Callable[[], Tensor], slow: Callable[[], Tensor]) -> None:
    outs = [fast(), slow()]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-11)
    parameters = list(module.parameters())
    weight = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), parameters) for out in outs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("frames", [1, 3])
def test_resampler_is_the_formula(frames: int) -> None:
    module = randomised(PerceiverResampler(12, depth=2, heads=2, head_dim=4, latents=5, max_frames=3))
    x = torch.randn(4, frames, 6, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weights = dict(module.named_parameters())
    same_with_gradients(module, lambda: module(x), lambda: slow_resampler(x, weights, 2, 2))


@pytest.mark.parametrize("mask_ffn", [False, True])
def test_block_is_the_formula(mask_ffn: bool) -> None:
    module = randomised(GatedCrossAttentionBlock(16, 12, heads=2, head_dim=4, mask_ffn_without_media=mask_ffn))
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(3, 5, 16, generator=generator, dtype=torch.float64)
    media = torch.randn(3, 4, 12, generator=generator, dtype=torch.float64)
    counts, phi = torch.tensor([2, 0, 1]), torch.tensor([[0, 1, 1, 2, 2], [0] * 5, [0, 0, 1, 1, 1]])
    segments = segments_from_slots(slots_from_phi(phi, image_table(counts)), 3)
    weights = dict(module.named_parameters())
    same_with_gradients(
        module,
        lambda: module(x, media, segments),
        lambda: slow_block(x, list(media.split(counts.tolist())), phi, weights, 2, mask_ffn),
    )


def test_a_token_without_image_gets_exactly_zero_from_attention() -> None:
    block = GatedCrossAttentionBlock(16, 12, heads=2, head_dim=4)
    randomised(block).float()
    generator = torch.Generator().manual_seed(7)
    x, media = torch.randn(2, 4, 16, generator=generator), torch.randn(2, 4, 12, generator=generator)
    slots = torch.tensor([[-1, -1, 0, 0], [-1, 1, 1, 1]])
    with torch.no_grad():
        block.ff_gate.zero_()
        out = block(x, media, segments_from_slots(slots, 2))
    assert torch.equal(out[slots < 0], x[slots < 0])
    assert bool((out[slots >= 0] != x[slots >= 0]).any(-1).all())


def test_too_many_frames() -> None:
    with pytest.raises(UserError, match=r"4 frames.*max_frames=3"):
        PerceiverResampler(8, depth=1, heads=1, head_dim=4, latents=2, max_frames=3)(torch.zeros(1, 4, 2, 8))
