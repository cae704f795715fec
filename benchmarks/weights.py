"""Backbones and weights for both libraries, made from seeds, so that each process can make them on its own."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from benchmarks.sizes import Size
from flamingo.vision.encoder import build_open_clip


def seeded(name: str, shape: torch.Size, device: str = "cpu") -> Tensor:
    """Return a parameter's weights from its name: norms 1, gates 0.5 (open), matrices normal by their fan-in."""
    if name.endswith("_gate"):
        return torch.full(shape, 0.5)
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, device=device) * shape[-1] ** -0.5


def vision_arch(size: Size) -> dict[str, Any]:
    """Return open_clip's config of the ViT."""
    vision = {
        "image_size": size.image_size,
        "layers": size.vision_layers,
        "width": size.vision_width,
        "patch_size": size.patch,
        "head_width": 32 if size.vision_width < 128 else 64,
    }
    return {"embed_dim": 512, "vision_cfg": vision, "quick_gelu": True}


def backbones(size: Size) -> tuple[nn.Module, PreTrainedModel]:
    """Return the vision encoder and the LM."""
    torch.manual_seed(0)
    encoder = build_open_clip(vision_arch(size))
    config = OPTConfig(
        vocab_size=size.vocab,
        hidden_size=size.lm_width,
        word_embed_proj_dim=size.lm_width,
        ffn_dim=4 * size.lm_width,
        num_hidden_layers=size.lm_layers,
        num_attention_heads=size.lm_heads,
        max_position_embeddings=2048,
        dropout=0.0,
    )
    return encoder.eval(), OPTForCausalLM(config).eval()


def peer_state(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our trained weights by open_flamingo's names: `perceiver.*`, `gated_cross_attn_layers.*`."""
    inside = {"mlp.norm": "0", "mlp.up_proj": "1", "mlp.down_proj": "3"}
    out = {}
    for key, value in own.items():
        if ".v_proj." in key:
            continue
        if ".k_proj." in key:
            value = torch.cat([value, own[key.replace("k_proj", "v_proj")]])
        for ours, theirs in {"q_proj": "to_q", "k_proj": "to_kv", "o_proj": "to_out"}.items():
            key = key.replace(ours, theirs)
        in_resampler = key.startswith("resampler.")
        for ours, theirs in inside.items():
            key = key.replace(ours, f"1.{theirs}" if in_resampler else f"ff.{theirs}")
        if in_resampler:
            key = key.replace(".attn.", ".0.").replace("resampler.", "perceiver.")
        out[key.replace("cross_attn_blocks.", "lang_encoder.gated_cross_attn_layers.")] = value
    return out
