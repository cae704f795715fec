"""Released names of weights to ours, as tables and one pure function.

Every key of a checkpoint is renamed, split, or left out for a reason that the table gives; a key that no
line knows stops the conversion with its name. Two source keys may name one weight (a tied head, OpenFlamingo's second
list of its blocks): they must then hold the same values.

Letters of the templates: 1, 2, ... the groups of the pattern.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flamingo.errors import UserError

Rule = tuple[str, str | tuple[str, str] | None]
"""Pattern of the whole key, and its new name, the two names of its upper and lower half, or None for "leave out"."""

BLOCK = r"lang_encoder\.(?:.+\.)?(\d+)\.gated_cross_attn_layer\."
ALIAS = r"lang_encoder\.gated_cross_attn_layers\.(\d+)\."

# Buffers that older versions of transformers saved: constants that today's classes compute themselves.
_CONSTANTS: tuple[Rule, ...] = (
    (r".+\.rotary_emb\.inv_freq", None),
    (r".+\.position_ids", None),
    (r".+\.(?:attention|attn)\.(?:bias|masked_bias)", None),
    (r".+\.attn_bias", None),
)


def _block_rules(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of one gated block in OpenFlamingo (`ff`) or Otter (`feed_forward`)."""
    mlp = prefix + r"(?:ff|feed_forward)\."
    return (
        (prefix + r"(attn_gate|ff_gate)", r"cross_attn_blocks.\1.\2"),
        (prefix + r"attn\.norm\.(weight|bias)", r"cross_attn_blocks.\1.attn.norm.\2"),
        (prefix + r"attn\.to_q\.weight", r"cross_attn_blocks.\1.attn.q_proj.weight"),
        (
            prefix + r"attn\.to_kv\.weight",
            (r"cross_attn_blocks.\1.attn.k_proj.weight", r"cross_attn_blocks.\1.attn.v_proj.weight"),
        ),
        (prefix + r"attn\.to_out\.weight", r"cross_attn_blocks.\1.attn.o_proj.weight"),
        (mlp + r"0\.(weight|bias)", r"cross_attn_blocks.\1.mlp.norm.\2"),
        (mlp + r"1\.weight", r"cross_attn_blocks.\1.mlp.up_proj.weight"),
        (mlp + r"3\.weight", r"cross_attn_blocks.\1.mlp.down_proj.weight"),
    )


# OpenFlamingo keeps a resampler layer as a pair (attention 0, feed-forward 1), Otter as one module.
_ATTN, _MLP = r"perceiver\.layers\.(\d+)\.(?:0\.)?", r"perceiver\.layers\.(\d+)\.(?:1|feed_forward)\."
OPENFLAMINGO: tuple[Rule, ...] = (
    (r"perceiver\.latents", "resampler.latents"),
    (r"perceiver\.frame_embs", "resampler.frame_embeddings"),
    (r"perceiver\.norm\.(weight|bias)", r"resampler.norm.\1"),
    (_MLP + r"0\.(weight|bias)", r"resampler.layers.\1.mlp.norm.\2"),
    (_MLP + r"1\.weight", r"resampler.layers.\1.mlp.up_proj.weight"),
    (_MLP + r"3\.weight", r"resampler.layers.\1.mlp.down_proj.weight"),
    (_ATTN + r"(norm_media|norm_latents)\.(weight|bias)", r"resampler.layers.\1.attn.\2.\3"),
    (_ATTN + r"to_q\.weight", r"resampler.layers.\1.attn.q_proj.weight"),
    (_ATTN + r"to_kv\.weight", (r"resampler.layers.\1.attn.k_proj.weight", r"resampler.layers.\1.attn.v_proj.weight")),
    (_ATTN + r"to_out\.weight", r"resampler.layers.\1.attn.o_proj.weight"),
    *_block_rules(BLOCK),
    *_block_rules(ALIAS),
    *_CONSTANTS,
    (r"vision_encoder\.(?:vision_model\.)?(.+)", r"vision_encoder.tower.\1"),
    (r"lang_encoder\.(.+\.\d+)\.decoder_layer\.(.+)", r"language_model.\1.\2"),
    (r"lang_encoder\.(?!old_decoder_blocks)(.+)", r"language_model.\1"),
)
"""OpenFlamingo 1 and 2, Otter and Multimodal-GPT; a block's index is that of the decoder layer after it."""

_P, _X = r"model\.perceiver_resampler\.blocks\.(\d+)\.", r"model\.gated_cross_attn_layers\.(\d+)\."
IDEFICS: tuple[Rule, ...] = (
    *_CONSTANTS,
    (r"model\.vision_model\.(.+)", r"vision_encoder.tower.\1"),
    (r"model\.perceiver_resampler\.latents", "resampler.latents"),
    (r"model\.perceiver_resampler\.layer_norm\.(weight|bias)", r"resampler.norm.\1"),
    (_P + r"0\.context_layer_norm\.(weight|bias)", r"resampler.layers.\1.attn.norm_media.\2"),
    (_P + r"0\.latents_layer_norm\.(weight|bias)", r"resampler.layers.\1.attn.norm_latents.\2"),
    (_P + r"0\.([qk])_layer_norm\.(weight|bias)", r"resampler.layers.\1.attn.\2_norm.\3"),
    (_P + r"0\.([qkv])_proj\.weight", r"resampler.layers.\1.attn.\2_proj.weight"),
    (_P + r"0\.output_proj\.weight", r"resampler.layers.\1.attn.o_proj.weight"),
    (_P + r"1\.ln\.(weight|bias)", r"resampler.layers.\1.mlp.norm.\2"),
    (_P + r"1\.fc\.weight", r"resampler.layers.\1.mlp.up_proj.weight"),
    (_P + r"1\.c_proj\.weight", r"resampler.layers.\1.mlp.down_proj.weight"),
    (_X + r"input_layernorm\.weight", r"cross_attn_blocks.\1.attn.norm.weight"),
    (_X + r"post_attention_layernorm\.weight", r"cross_attn_blocks.\1.mlp.norm.weight"),
    (_X + r"cross_attn\.([qkvo])_proj\.weight", r"cross_attn_blocks.\1.attn.\2_proj.weight"),
    (_X + r"cross_attn\.([qk])_layer_norm\.weight", r"cross_attn_blocks.\1.attn.\2_norm.weight"),
    (_X + r"mlp\.(gate|up|down)_proj\.weight", r"cross_attn_blocks.\1.mlp.\2_proj.weight"),
    (_X + r"alpha_cross_attn", r"cross_attn_blocks.\1.attn_gate"),
    (_X + r"alpha_dense", r"cross_attn_blocks.\1.ff_gate"),
    (r"model\.embed_tokens\.additional_embedding\.weight", "new_tokens.input_rows"),
    (r"lm_head\.additional_fc\.weight", "new_tokens.output_rows"),
    (r"model\.((?:embed_tokens|layers|norm)\..+)", r"language_model.model.\1"),
    (r"lm_head\.weight", "language_model.lm_head.weight"),
)
"""IDEFICS; a block's index counts the blocks."""

_REFUSED = (
    ("lora_", "holds LoRA weights; merge them into the language model first (peft: merge_and_unload)"),
    ("media_time_embs", "has embeddings for the position of an image (max_num_media), which no released model uses"),
)


def translate(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Return the weights under our names.

    Raises:
        UserError: a key that no rule knows (named), or two keys of one weight with different values.
    """
    compiled = [(re.compile(pattern), target) for pattern, target in rules]
    clean: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    unknown = []
    for key, value in _with_full_names(state).items():
        matches = ((match, target) for pattern, target in compiled if (match := pattern.fullmatch(key)))
        if (first := next(matches, None)) is None:
            unknown.append(key)
            continue
        match, target = first
        if target is None:
            continue
        names = (target,) if isinstance(target, str) else target
        for name, part in zip(names, value.chunk(len(names)) if len(names) > 1 else (value,), strict=True):
            name = match.expand(name)
            # IDEFICS stores a vector of gates as (1, 1, width).
            part = part.reshape(-1) if name.endswith("_gate") else part
            if name in clean and not _same(clean[name], part):
                raise UserError(f"the checkpoint's {key} and {origin[name]} are one weight, but their values differ")
            clean[name], origin[name] = part, key
    if unknown:
        raise UserError(
            f"the checkpoint has unknown keys: {unknown[0]} (and {len(unknown) - 1} more); is it a model of another "
            "family?"
        )
    return clean


def _with_full_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take away `module.` (DDP) in front of the keys, and name the layers in OpenFlamingo's second list of them."""
    named = {key.removeprefix("module."): value for key, value in state.items()}
    for key in named:
        for part, reason in _REFUSED:
            if part in key:
                raise UserError(f"the checkpoint {reason}: {key}")
    wrapped = re.compile(r"(lang_encoder\..+)\.\d+\.(?:gated_cross_attn_layer|decoder_layer)\..+")
    path = next((match[1] for key in named if (match := wrapped.fullmatch(key))), "")
    old = re.compile(r"lang_encoder\.old_decoder_blocks\.(\d+)\.(.+)")
    for key in [key for key in named if path and old.fullmatch(key)]:
        value, name = named.pop(key), old.sub(rf"{path}.\1.decoder_layer.\2", key)
        if name in named and not _same(named[name], value):
            raise UserError(f"the checkpoint's {key} and {name} are one weight, but their values differ")
        named.setdefault(name, value)
    return named


def block_layers(clean: Mapping[str, Tensor]) -> list[int]:
    """Return the indices of the gated blocks, in order."""
    return sorted({int(name.split(".")[1]) for name in clean if name.startswith("cross_attn_blocks.")})


def renumber_blocks(clean: Mapping[str, Tensor], every: int) -> dict[str, Tensor]:
    """Number IDEFICS' blocks, which count themselves, by the decoder layer they stand before: 0, every, 2*every, ..."""
    count = re.compile(r"cross_attn_blocks\.(\d+)\.")
    return {count.sub(lambda m: f"cross_attn_blocks.{int(m[1]) * every}.", name): t for name, t in clean.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))
