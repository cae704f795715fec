"""Perceiver Resampler: any number of patch tokens of an image or clip in, L latent tokens out.

Alayrac et al. 2022, section 3.1.1 and figure 5; the parameters correspond one to one to OpenFlamingo's and
IDEFICS' weights. Keys and values come from the patches AND the latents, concatenated, as in the paper.

Letters: I images, F frames, P patches, V encoder's width, L latents, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from flamingo.errors import UserError
from flamingo.layers.attention import ACTIVATIONS, NORMS, FeedForward, attend, norm_layer
from flamingo.layers.connector import Connector
from flamingo.options import choice, positive


@dataclass(kw_only=True, slots=True)
class ResamplerConfig:
    """The Perceiver Resampler (paper, section 3.1.1); the defaults are OpenFlamingo's."""

    depth: int = 6
    """Number of layers."""
    heads: int = 8
    """Attention heads."""
    head_dim: int = 64
    """Width of one head."""
    latents: int = 64
    """Tokens per image or clip that come out."""
    width: int | None = None
    """Width of the latents; None: the encoder's."""
    init_std: float = 1.0
    """Deviation of the initial latents and time embeddings. At small widths 1 drowns the image: see LOG.md."""
    ff_mult: float = 4.0
    """Width of the feed-forward as a multiple of the model width."""
    activation: str = "gelu"
    """Of the feed-forward."""
    max_frames: int | None = None
    """Learned time embeddings for this many frames; None: none, frames are then a bag of patches."""
    qk_norm: str | None = None
    """Norm of each head's queries and keys: "layernorm" (IDEFICS), "rmsnorm"; None: none."""

    def __post_init__(self) -> None:
        choice("resampler_config.activation", self.activation, ACTIVATIONS)
        choice("resampler_config.qk_norm", self.qk_norm, (*NORMS, None))
        for name in ("depth", "heads", "head_dim", "latents"):
            positive(f"resampler_config.{name}", getattr(self, name))


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

    def attention_products(self, media: Tensor, latents: Tensor) -> int:
        """Return the multiply-adds of queries with keys and of weights with values."""
        keys = media.shape[1] + latents.shape[1]
        return 2 * latents.shape[0] * latents.shape[1] * keys * self.q_proj.out_features

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


class PerceiverResampler(Connector):
    """(I, F, P, V) patch features of images (F=1) or clips to (I, L, D) latents.

    D is the encoder's width V, as in OpenFlamingo and IDEFICS, unless `width` gives another: then a linear map brings
    the patches to it first (the paper's resampler is 1,536 wide whatever its encoder's width).

    Raises:
        UserError: a clip has more frames than the module has time embeddings.
    """

    Options = ResamplerConfig
    _no_split_modules = ("PerceiverLayer",)

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
        self.width = width = vision_width if width is None else width
        self.latents = nn.Parameter(torch.randn(latents, width) * init_std)
        self.frame_embeddings = nn.Parameter(torch.randn(max_frames, width) * init_std) if max_frames else None
        self.layers = nn.ModuleList(
            PerceiverLayer(width, heads=heads, head_dim=head_dim, ff_mult=ff_mult, act=activation, qk_norm=qk_norm)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def num_latents(self, frames: int, patches: int) -> int:
        """Return L, the same for every image and clip."""
        return len(self.latents)

    def initialize(self) -> None:
        """Draw the latents and time embeddings anew."""
        init.normal_(self.latents, std=self.init_std)
        if self.frame_embeddings is not None:
            init.normal_(self.frame_embeddings, std=self.init_std)

    def connect(self, features: Float[Tensor, "I F P V"]) -> Float[Tensor, "I L D"]:
        """Return the latents of images or clips of F frames each."""
        frames = features.shape[1]
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
