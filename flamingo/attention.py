"""The one place where attention is computed for the resampler and the gated blocks.

Notable: a text token attends to the L latents of its one picture, so the work is block-diagonal and never a masked row
over all pictures. On CUDA that is xformers' memory-efficient kernel with a `BlockDiagonalMask`; elsewhere the tokens
are laid out as one padded table per picture and torch's SDPA runs over it (xformers has no CPU operator). Both are
tested, values and gradients, against a slow twin that follows the formula.

Letters: N queries, A pictures, L latents, H heads, K width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from flamingo.errors import UserError
from flamingo.media import Segments


def attend(
    q: Float[Tensor, "B S H K"], k: Float[Tensor, "B L H K"], v: Float[Tensor, "B L H K"]
) -> Float[Tensor, "B S H K"]:
    """Softmax attention of every query to every key of its batch entry, scaled by K ** -0.5."""
    if q.is_cuda and _xformers_takes(q):
        return _xformers().memory_efficient_attention(q, k, v)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def attend_segments(
    q: Float[Tensor, "N H K"],
    k: Float[Tensor, "I L H K"],
    v: Float[Tensor, "I L H K"],
    segments: Segments,
) -> Float[Tensor, "N H K"]:
    """Attention of every query to the L keys of its own picture; query n belongs to `segments.tokens[n]`."""
    if not segments.lengths:
        return q * (k.sum() + v.sum())  # no rows; keeps keys and values in the graph, with gradients of zero
    if not segments.is_whole_stack:
        k, v = k.index_select(0, segments.pictures), v.index_select(0, segments.pictures)
    if q.is_cuda and _xformers_takes(q):
        return _attend_xformers(q, k, v, segments.lengths)
    longest = segments.pad.shape[1]
    if all(length == longest for length in segments.lengths):
        return attend(q.unflatten(0, (-1, longest)), k, v).flatten(0, 1)
    padded = q.index_select(0, segments.pad.flatten()).unflatten(0, segments.pad.shape)
    return attend(padded, k, v).flatten(0, 1).index_select(0, segments.unpad)


def attend_segments_slow(
    q: Float[Tensor, "N H K"],
    k: Float[Tensor, "I L H K"],
    v: Float[Tensor, "I L H K"],
    segments: Segments,
) -> Float[Tensor, "N H K"]:
    """The twin of `attend_segments` for tests: all keys of all pictures, and a mask."""
    lengths = torch.tensor(segments.lengths, device=q.device)
    owner = segments.pictures.repeat_interleave(lengths)
    scores = torch.einsum("nhk,ilhk->nhil", q, k) * q.shape[-1] ** -0.5
    hidden = owner[:, None] != torch.arange(k.shape[0], device=q.device)
    scores = scores.masked_fill(hidden[:, None, :, None], float("-inf"))
    weights = scores.flatten(2).softmax(-1).unflatten(2, scores.shape[2:])
    return torch.einsum("nhil,ilhk->nhk", weights, v)


def _attend_xformers(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    ops = _xformers()
    bias = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, [k.shape[1]] * len(lengths))
    keys, values = k.flatten(0, 1)[None], v.flatten(0, 1)[None]
    return ops.memory_efficient_attention(q[None], keys, values, attn_bias=bias)[0]


def _xformers_takes(q: Tensor) -> bool:
    """xformers' kernels want heads in multiples of 8 and no float64; the rest goes to SDPA."""
    return q.shape[-1] % 8 == 0 and q.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _xformers():  # type: ignore[no-untyped-def]
    try:
        import xformers.ops as ops
    except ImportError as error:
        raise UserError(
            f"attention on CUDA needs xformers, which does not import here ({error}); install the xformers release "
            f"that was built for torch {torch.__version__}"
        ) from error
    return ops
