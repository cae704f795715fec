"""Otter, written anew from its formulas with its names of weights: the reference that cannot be installed any more.

Letters: B batch, T images, F frames, P patches, N text tokens, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tests.model import peers, tiny

ANSWER = "<answer>"


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """8 heads over the last two axes; a query that sees no key gets zero."""
    q, k, v = (x.unflatten(-1, (8, -1)).transpose(-2, -3) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -1e30)
    weights = scores.softmax(-1)
    if seen is not None:
        weights = weights * seen.any(-1)[:, None, :, None]
    return (weights @ v).transpose(-2, -3).flatten(-2)


class Mlp(nn.ModuleList):
    def __init__(self, width: int) -> None:
        super().__init__([nn.LayerNorm(width), linear(width, 4 * width), nn.GELU(), linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def linear(inside: int, outside: int) -> nn.Linear:
    return nn.Linear(inside, outside, bias=False)


class PerceiverBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_kv, self.to_out = linear(width, 512), linear(width, 1024), linear(512, width)
        self.feed_forward = Mlp(width)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        normed = self.norm_latents(latents)
        keys, values = self.to_kv(torch.cat([self.norm_media(x), normed], dim=-2)).chunk(2, dim=-1)
        latents = latents + self.to_out(attention(self.to_q(normed), keys, values))
        return latents + self.feed_forward(latents)


class Perceiver(nn.Module):
    def __init__(self, width: int, frames: int | None) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(64, width))
        self.frame_embs = None if frames is None else nn.Parameter(torch.randn(frames, width))
        self.layers = nn.ModuleList(PerceiverBlock(width) for _ in range(6))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, F, P, D) to (B, T, 64, D)."""
        if self.frame_embs is not None:
            x = x + self.frame_embs[: x.shape[2], None]
        x = x.flatten(2, 3)
        latents = self.latents.expand(*x.shape[:2], -1, -1)
        for layer in self.layers:
            latents = layer(x, latents)
        return self.norm(latents)


class CrossAttention(nn.Module):
    def __init__(self, width: int, media: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_kv, self.to_out = linear(width, 512), linear(media, 1024), linear(512, width)

    def forward(self, x: Tensor, media: Tensor, seen: Tensor) -> Tensor:
        keys, values = self.to_kv(media.flatten(1, 2)).chunk(2, dim=-1)
        return self.to_out(attention(self.to_q(self.norm(x)), keys, values, seen))


class Block(nn.Module):
    def __init__(self, width: int, media: int) -> None:
        super().__init__()
        self.attn = CrossAttention(width, media)
        self.attn_gate, self.ff_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.feed_forward = Mlp(width)


class Layer(nn.Module):
    def __init__(self, block: Block | None, decoder_layer: nn.Module) -> None:
        super().__init__()
        self.gated_cross_attn_layer = block
        self.decoder_layer = decoder_layer
        self.media: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        block = self.gated_cross_attn_layer
        if block is not None:
            assert self.media is not None
            x = x + block.attn_gate.tanh() * block.attn(x, *self.media)
            x = x + block.ff_gate.tanh() * block.feed_forward(x)
        return self.decoder_layer(x, *args, **kwargs)


class Otter(nn.Module):
    """Called with images (B, T, F, C, S, S), padded with any, and text (B, N)."""

    def __init__(self, family: str, every: int, frames: int | None) -> None:
        super().__init__()
        tokens = tokenizer()
        self.image_token_id = tokens.convert_tokens_to_ids("<image>")
        self.vision_encoder: Any = tiny.vision()
        self.perceiver = Perceiver(24, frames)
        lm = peers.language(family)
        lm.resize_token_embeddings(len(tokens), mean_resizing=False)
        inner = lm.model if family == "llama" else lm.transformer
        name = "layers" if family == "llama" else "blocks"
        wrapped = [
            Layer(Block(32, 24) if (i + 1) % every == 0 else None, layer)
            for i, layer in enumerate(getattr(inner, name))
        ]
        setattr(inner, name, nn.ModuleList(wrapped))
        self.lang_encoder = lm
        self.layers = lambda: wrapped
        peers.randomise(self, 4)

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        shape = images.shape[:3]
        tokens = self.vision_encoder(images.flatten(0, 2)).last_hidden_state[:, 1:]
        media = self.perceiver(tokens.unflatten(0, shape))
        count = (input_ids == self.image_token_id).cumsum(1)
        number = torch.arange(1, media.shape[1] + 1).repeat_interleave(64)
        for layer in self.layers():
            layer.media = (media, count[..., None] == number)
        return self.lang_encoder(input_ids=input_ids, attention_mask=attention_mask).logits

    def released(self) -> dict[str, Tensor]:
        """The state dict with CLIP's keys as they were before transformers 5."""
        state = {name: value.clone() for name, value in self.state_dict().items()}
        prefix = "vision_encoder."
        return {name.replace(prefix, f"{prefix}vision_model.", 1): value for name, value in state.items()}


def tokenizer() -> Any:
    """The tokenizer after Otter has added its tokens, in its order."""
    tokens = tiny.tokenizer()
    tokens.add_special_tokens({"additional_special_tokens": [peers.EOC, peers.IMAGE, ANSWER]})
    tokens.add_special_tokens({"pad_token": "<PAD>"})
    return tokens


def config(model: Otter, every: int) -> dict[str, Any]:
    """Otter's config.json, with what transformers 4.30 wrote into it."""
    old = {"_name_or_path": "", "add_cross_attention": False, "bad_words_ids": None, "max_length": 20, "top_k": 50,
           "torch_dtype": "float32", "transformers_version": "4.30.1", "use_bfloat16": False}  # fmt: skip
    text = {**model.lang_encoder.config.to_dict(), **old}
    vision = {**model.vision_encoder.config.to_dict(), **old}
    return {
        "architectures": ["OtterForConditionalGeneration"],
        "model_type": "otter",
        "cross_attn_every_n_layers": every,
        "only_attend_previous": True,
        "use_media_placement_augmentation": True,
        "text_config": text,
        "vision_config": vision,
        "torch_dtype": "float32",
    }
