"""Attention for the resampler and the gated blocks; nothing else in the library computes it.

A text token attends to the L latents of its one image, so the work is block-diagonal and never a masked row
over all images. On CUDA that is xformers' memory-efficient kernel with a `BlockDiagonalMask`; elsewhere, and where
xformers is not installed, the tokens are laid out as one padded table per image and torch's SDPA runs over it
(xformers has no CPU operator). Both are tested, values and gradients, against a slow twin in the
tests that follows the formula.

Where a token sees all previous images, which no released model does, SDPA runs over each row with a mask.

Letters: N queries, A groups of them, I images, M most images of a row, L latents, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flamingo.layers.media_mask import Segments


def attend(
    q: Float[Tensor, "B S H K"], k: Float[Tensor, "B L H K"], v: Float[Tensor, "B L H K"]
) -> Float[Tensor, "B S H K"]:
    """Return softmax attention of every query to every key of its batch entry, scaled by K ** -0.5."""
    if q.is_cuda and _xformers_takes(q):
        return _xformers().memory_efficient_attention(q, k, v)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


SHORT_ROWS = 128
"""Tokens up to which `training_kernel` takes plain products on a CPU; from 256 on the fused kernel is faster."""


def training_kernel(labels: Tensor | None, device: torch.device, *, in_bf16: bool) -> AbstractContextManager[None]:
    """Return a context in which SDPA, the LM's too, trains on rows like `labels` (B, T) with the faster kernel.

    On a CPU the backward of torch's fused kernel takes 1.4 to 2.7 times as long as plain products where rows are short
    and bf16. Everywhere else torch chooses. The graph keeps the choice, so the backward may run outside.
    """
    if labels is not None and labels.shape[1] <= SHORT_ROWS and device.type == "cpu" and in_bf16:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def usual_kernel(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which torch chooses SDPA's kernel, inside `training_kernel` too."""
    return sdpa_kernel(_EVERY_KERNEL) if device.type == "cpu" else nullcontext()


_EVERY_KERNEL: list[SDPBackend] = [
    kernel for kernel in SDPBackend.__members__.values() if kernel is not SDPBackend.ERROR
]


def attend_segments(
    q: Float[Tensor, "N H K"], k: Float[Tensor, "I L H K"], v: Float[Tensor, "I L H K"], segments: Segments
) -> Float[Tensor, "N H K"]:
    """Return attention of every query to the L keys of each image it sees; query n is token `segments.tokens[n]`."""
    if not segments.lengths:
        return q * (k.sum() + v.sum())  # no rows; keeps keys and values in the graph, with gradients of zero
    if segments.maps is not None:
        segments.maps.append(attention_weights(q, k, segments))
    if segments.reach is not None:
        return _attend_rows(q, k, v, segments)
    if not segments.is_whole_stack:
        k, v = k.index_select(0, segments.images), v.index_select(0, segments.images)
    if q.is_cuda and _xformers_takes(q):
        return _attend_xformers(q, k, v, segments.lengths)
    longest = segments.pad.shape[1]
    if all(length == longest for length in segments.lengths):
        return attend(q.unflatten(0, (-1, longest)), k, v).flatten(0, 1)
    padded = q.index_select(0, segments.pad.flatten()).unflatten(0, segments.pad.shape)
    return attend(padded, k, v).flatten(0, 1).index_select(0, segments.unpad)


def attention_weights(
    q: Float[Tensor, "N H K"], k: Float[Tensor, "I L H K"], segments: Segments
) -> Float[Tensor, "N H W"]:
    """Return how each query's attention is spread over the latents it sees: W = L, or M * L of its row's images.

    The slow way, which copies the keys for every query; for maps to look at.
    """
    group = segments.unpad // segments.pad.shape[1]
    indices = (segments.images[:, None] if segments.reach is None else segments.reach)[group]
    keys = k[indices.clamp(min=0)]
    scores = torch.einsum("nhk,nmlhk->nhml", q, keys) * q.shape[-1] ** -0.5
    if segments.upto is not None:
        column = torch.arange(indices.shape[1], device=q.device)
        hidden = column >= segments.upto.flatten()[segments.unpad][:, None]
        scores = scores.masked_fill(hidden[:, None, :, None], float("-inf"))
    return scores.flatten(2).softmax(-1)


def laid_out(maps: list[Tensor], segments: Segments, blocks: int, width: int) -> tuple[Float[Tensor, "B H T W"], ...]:
    """Return each block's weights (N, H, W) at their positions in the text, zero for tokens that see nothing.

    Where no token of the call sees an image the blocks left no weights; then there is one head of zeros, `width` wide.
    """
    rows, length = segments.sees.shape
    if not maps:
        return (torch.zeros(rows, 1, length, width, device=segments.sees.device),) * blocks
    out = []
    for weights in maps:
        flat = weights.new_zeros(rows * length, *weights.shape[1:])
        flat = flat.index_copy(0, segments.tokens.to(weights.device), weights)
        out.append(flat.unflatten(0, (rows, length)).transpose(1, 2))
    return tuple(out)


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Attend from each row's queries to all keys of the row's images, with a mask of how many images each sees."""
    assert segments.reach is not None
    assert segments.upto is not None
    reach = segments.reach.clamp(min=0)
    keys, values = (x[reach].flatten(1, 2).transpose(1, 2) for x in (k, v))
    owner = torch.arange(reach.shape[1], device=q.device).repeat_interleave(k.shape[1])
    seen = owner < segments.upto[..., None]
    padded = q.index_select(0, segments.pad.flatten()).unflatten(0, segments.pad.shape).transpose(1, 2)
    out = F.scaled_dot_product_attention(padded, keys, values, attn_mask=seen[:, None])
    return out.transpose(1, 2).flatten(0, 1).index_select(0, segments.unpad)


def _attend_xformers(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    keys, values = k.flatten(0, 1)[None], v.flatten(0, 1)[None]
    bias = block_diagonal_bias(lengths, k.shape[1])
    return _xformers().memory_efficient_attention(q[None], keys, values, attn_bias=bias)[0]


def block_diagonal_bias(lengths: list[int], latents: int) -> Any:
    """Return xformers' bias under which group after group of `lengths` queries sees `latents` keys of its own."""
    return _xformers().fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, [latents] * len(lengths))


def _xformers_takes(q: Tensor) -> bool:
    """Return whether xformers can run this: heads of a multiple of 8 and no float64; the rest goes to SDPA."""
    fits = q.shape[-1] % 8 == 0 and q.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return fits and xformers_error() is None


@cache
def xformers_error() -> str | None:
    """Return why xformers cannot be used, None when it can; without it SDPA serves CUDA as it serves the CPU."""
    try:
        _xformers()
    except (ImportError, OSError) as error:  # OSError: a library built for another CUDA
        return str(error)
    return None


def _xformers() -> Any:
    return import_module("xformers.ops")


ACTIVATIONS = ("gelu", "relu", "silu", "squared_relu")
NORMS = ("layernorm", "rmsnorm")


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """Return a feed-forward's nonlinearity by its name in the config."""
    if name == "squared_relu":
        return _squared_relu
    functions: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
    return functions[name]


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def norm_layer(kind: str, width: int, eps: float = 1e-5) -> nn.Module:
    """Return a norm over the last axis by its name in the config."""
    return {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}[kind](width, eps=eps)


class FeedForward(nn.Module):
    """Pre-norm feed-forward without biases: `down(act(up(norm(x))))`, or `down(act(gate(y)) * up(y))`, y = norm(x)."""

    def __init__(
        self, width: int, inner: int, *, act: str, norm: str = "layernorm", eps: float = 1e-5, gated: bool = False
    ) -> None:
        super().__init__()
        self.norm = norm_layer(norm, width, eps)
        self.gate_proj = nn.Linear(width, inner, bias=False) if gated else None
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act = activation_function(act)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return the update, without the residual."""
        x = self.norm(x)
        up = self.up_proj(x)
        return self.down_proj(self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up)
