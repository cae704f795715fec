"""Perceiver Resampler: any number of patch tokens of an image or clip in, L latent tokens out.

Alayrac et al. 2022, section 3.1.1 and figure 5; parameters laid out so that OpenFlamingo's and IDEFICS' weights map one
to one. Notable: keys and values come from the patches AND the latents, concatenated, as in the paper.

Letters: I images, F frames, P patches, V encoder's width, L latents, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from flamingo.errors import UserError
from flamingo.layers.attention import attend
from flamingo.vision.frames import by_length


def activation(name: str) -> Callable[[Tensor], Tensor]:
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
        self.act = activation(act)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return the update, without the residual."""
        x = self.norm(x)
        up = self.up_proj(x)
        return self.down_proj(self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up)


class PerceiverAttention(nn.Module):
    """Latents attend to the patches and to themselves."""

    def __init__(self, width: int, *, heads: int, head_dim: int, qk_norm: str | None = None) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.q_norm = norm_layer(qk_norm, head_dim) if qk_norm else None
        self.k_norm = norm_layer(qk_norm, head_dim) if qk_norm else None

    def forward(self, media: Float[Tensor, "I P D"], latents: Float[Tensor, "I L D"]) -> Float[Tensor, "I L D"]:
        """Return the update of the latents, without the residual."""
        latents = self.norm_latents(latents)
        keys = torch.cat([self.norm_media(media), latents], dim=1)
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1))
            for projection, x in ((self.q_proj, latents), (self.k_proj, keys), (self.v_proj, keys))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(attend(q, k, v).flatten(-2))


class PerceiverLayer(GradientCheckpointingLayer):
    """One resampler layer; it can be recomputed in the backward pass."""

    def __init__(
        self, width: int, *, heads: int, head_dim: int, ff_mult: float, act: str, qk_norm: str | None = None
    ) -> None:
        super().__init__()
        self.attn = PerceiverAttention(width, heads=heads, head_dim=head_dim, qk_norm=qk_norm)
        self.mlp = FeedForward(width, int(width * ff_mult), act=act)

    def forward(self, latents: Float[Tensor, "I L D"], media: Float[Tensor, "I P D"]) -> Float[Tensor, "I L D"]:
        """Return the new latents."""
        latents = latents + self.attn(media, latents)
        return latents + self.mlp(latents)


class PerceiverResampler(nn.Module):
    """(I, F, P, V) patch features of images (F=1) or clips to (I, L, D) latents.

    D is the encoder's width V, as in OpenFlamingo and IDEFICS, unless `width` gives another: then a linear map brings
    the patches to it first (the paper's resampler is 1,536 wide whatever its encoder's width).

    Raises:
        UserError: a clip has more frames than the module has time embeddings.
    """

    def __init__(
        self,
        vision_width: int,
        *,
        width: int | None = None,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        latents: int = 64,
        ff_mult: float = 4.0,
        activation: str = "gelu",
        max_frames: int | None = None,
        init_std: float = 1.0,
        qk_norm: str | None = None,
    ) -> None:
        super().__init__()
        self.init_std = init_std
        self.in_proj = None if width is None else nn.Linear(vision_width, width, bias=False)
        width = vision_width if width is None else width
        self.latents = nn.Parameter(torch.randn(latents, width) * init_std)
        self.frame_embeddings = nn.Parameter(torch.randn(max_frames, width) * init_std) if max_frames else None
        self.layers = nn.ModuleList(
            PerceiverLayer(width, heads=heads, head_dim=head_dim, ff_mult=ff_mult, act=activation, qk_norm=qk_norm)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self, features: Float[Tensor, "*frames P V"], counts: Sequence[int] | None = None
    ) -> Float[Tensor, "I L D"]:
        """Return the latents of each image or clip, in this module's dtype whatever the encoder's.

        `features` is (I, F, P, V), or, with the number of frames of each, (N, P, V) of all frames.
        """
        return self._latents(features) if counts is None else by_length(self._latents, features, counts)

    def _latents(self, features: Float[Tensor, "I F P V"]) -> Float[Tensor, "I L D"]:
        frames = features.shape[1]
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(self.latents.dtype)
        if self.in_proj is not None:
            features = self.in_proj(features)
        if self.frame_embeddings is not None:
            if frames > len(self.frame_embeddings):
                raise UserError(
                    f"a clip has {frames} frames, but the resampler has time embeddings for "
                    f"{len(self.frame_embeddings)}; give the processor max_frames={len(self.frame_embeddings)}"
                )
            features = features + self.frame_embeddings[:frames, None]
        media = features.flatten(1, 2)
        latents = self.latents.to(media.dtype).expand(len(media), -1, -1)
        for layer in self.layers:
            latents = layer(latents, media)
        return self.norm(latents)
