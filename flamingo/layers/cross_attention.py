"""Gated cross-attention block: lets a frozen decoder layer look at an image, and starts as the identity.

Alayrac et al. 2022, section 3.1.2 and figure 4. The block holds parameters only. What the tokens may see
(`segments`), the media and the cache of their keys and values are arguments, so that recomputation in the backward
pass, two threads and FSDP2 (which gathers parameters around this `forward` alone) are all right by construction.

Letters: B batch, T text tokens, I images, L latents, D width of the LM, E width of the media, H heads, K head width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from flamingo.layers.attention import FeedForward, attend_segments, norm_layer
from flamingo.layers.media_mask import Segments

KeysValues = tuple[Tensor, Tensor]
"""A block's projected media, twice (I, L, H, K)."""


class CrossAttention(nn.Module):
    """Text tokens attend to the latents of the one image they see; the media are not normalised again."""

    def __init__(
        self,
        width: int,
        media_width: int,
        *,
        heads: int,
        head_dim: int,
        norm: str = "layernorm",
        eps: float = 1e-5,
        qk_norm: str | None = None,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.norm = norm_layer(norm, width, eps)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(media_width, inner, bias=False)
        self.v_proj = nn.Linear(media_width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.q_norm = norm_layer(qk_norm, head_dim, eps) if qk_norm else None
        self.k_norm = norm_layer(qk_norm, head_dim, eps) if qk_norm else None

    def project(self, media: Float[Tensor, "I L E"]) -> KeysValues:
        """Return the keys and values of the media, twice (I, L, H, K)."""
        keys, values = (proj(media).unflatten(-1, (self.heads, -1)) for proj in (self.k_proj, self.v_proj))
        return keys if self.k_norm is None else self.k_norm(keys), values

    def attention_products(self, x: Tensor, keys_values: KeysValues, segments: Segments) -> int:
        """Return the multiply-adds of queries with keys and of weights with values."""
        images = 1 if segments.reach is None else segments.reach.shape[1]
        return 2 * len(x) * images * keys_values[0].shape[1] * self.q_proj.out_features

    def forward(self, x: Float[Tensor, "N D"], keys_values: KeysValues, segments: Segments) -> Float[Tensor, "N D"]:
        """Return the update for the N tokens of `segments.tokens`, without gate and residual."""
        q = self.q_proj(self.norm(x)).unflatten(-1, (self.heads, -1))
        if self.q_norm is not None:
            q = self.q_norm(q)
        return self.o_proj(attend_segments(q, *keys_values, segments).flatten(-2))


class GatedCrossAttentionBlock(GradientCheckpointingLayer):
    """`x + tanh(attn_gate) * attn(x, media)`, then `x + tanh(ff_gate) * mlp(x)`; both gates start at `gate_init`.

    A token that sees no image gets exactly zero from the attention. The feed-forward runs for every token, as in the
    paper, OpenFlamingo and IDEFICS; with `mask_ffn_without_media` such a token skips it too.
    """

    # The cache is written only where nothing is recomputed (under generate, without gradients).
    _can_checkpoint_with_cache = True

    def __init__(
        self,
        width: int,
        media_width: int,
        *,
        heads: int = 8,
        head_dim: int = 64,
        ff_mult: float = 4.0,
        activation: str = "gelu",
        gate_init: float = 0.0,
        gate: str = "scalar",
        norm: str = "layernorm",
        norm_eps: float = 1e-5,
        qk_norm: str | None = None,
        gated_ff: bool = False,
        ff_width: int | None = None,
        mask_ffn_without_media: bool = False,
    ) -> None:
        super().__init__()
        self.gate_init = gate_init
        self.attn = CrossAttention(
            width, media_width, heads=heads, head_dim=head_dim, norm=norm, eps=norm_eps, qk_norm=qk_norm
        )
        inner = int(width * ff_mult) if ff_width is None else ff_width
        self.mlp = FeedForward(width, inner, act=activation, norm=norm, eps=norm_eps, gated=gated_ff)
        # A scalar gate has one dimension: FSDP2 cannot shard a tensor without dimensions.
        size = 1 if gate == "scalar" else width
        self.attn_gate = nn.Parameter(torch.full((size,), gate_init))
        self.ff_gate = nn.Parameter(torch.full((size,), gate_init))
        self.mask_ffn_without_media = mask_ffn_without_media

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        media: Float[Tensor, "I L E"],
        segments: Segments,
        cache: dict[str, KeysValues] | None = None,
        key: str = "",
    ) -> Float[Tensor, "B T D"]:
        """Return the tokens after the block.

        With a `cache`, `cache[key]` keeps the projected media; what it lacks of `media` is projected and appended.
        """
        known = None if cache is None else cache.get(key)
        if known is not None and len(known[0]) >= len(media):
            keys_values = known
        elif known is None or not len(known[0]):  # no image until now: the number of latents was not known
            keys_values = self.attn.project(media)
        else:
            new = self.attn.project(media[len(known[0]) :])
            keys_values = (torch.cat([known[0], new[0]]), torch.cat([known[1], new[1]]))
        if cache is not None and keys_values is not known:
            cache[key] = keys_values
        # With gradients the attention runs even over no tokens: every process of a sharded run must produce a gradient
        # (of zeros) for the same parameters, whether its batch has images or not.
        if segments.lengths or torch.is_grad_enabled():
            x = self._attend(x, keys_values, segments)
        update = self.ff_gate.tanh() * self.mlp(x)
        return x + (update * segments.sees[..., None] if self.mask_ffn_without_media else update)

    def _attend(self, x: Tensor, keys_values: KeysValues, segments: Segments) -> Tensor:
        flat = x.flatten(0, 1)
        update = self.attn(flat.index_select(0, segments.tokens), keys_values, segments)
        update = self.attn_gate.tanh() * update
        if segments.counts is not None:
            update = update.where(segments.counts[:, None], 0.0)
        return flat.index_add(0, segments.tokens, update.to(flat.dtype)).view_as(x)
