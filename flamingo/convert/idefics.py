"""IDEFICS' checkpoints to a model of this library.

Different from OpenFlamingo: blocks precede layers 0, n, 2n, ...; the resampler gets the encoder's class token
too; RMSNorm, SwiGLU and, in the releases, norms of queries and keys; nothing is seen after the end of a sequence. The
LM is a LLaMA and the encoder a CLIP under other class names. Its "decoupled" embeddings are what this library has
anyway: the frozen table of the LM and a small one of new tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    IdeficsConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flamingo.config import FlamingoConfig, VisionConfig
from flamingo.convert.build import assemble, dtype_of, empty_weights, load_clean
from flamingo.convert.files import config_from
from flamingo.convert.keys import IDEFICS, block_layers, renumber_blocks, translate
from flamingo.convert.openflamingo import Converted, load_tokenizer
from flamingo.errors import UserError
from flamingo.processor import IMAGE_TOKEN, FlamingoProcessor
from flamingo.vision.transform import ImageTransform

FAKE_TOKEN, END_OF_UTTERANCE = "<fake_token_around_image>", "<end_of_utterance>"


def from_idefics(
    state_dict: Mapping[str, Tensor],
    *,
    tokenizer: PreTrainedTokenizerBase | str,
    config: Mapping[str, Any] | PreTrainedConfig | None = None,
    vision: PreTrainedModel | PreTrainedConfig | None = None,
    language: PreTrainedModel | PreTrainedConfig | None = None,
    cross_attn_every_n_layers: int | None = None,
    image_size: int | None = None,
    dtype: str | torch.dtype | None = None,
) -> Converted:
    """Return (model, processor) with the source's logits.

    Args:
        state_dict: the checkpoint's tensors, as `flamingo.convert.files.read_checkpoint` gives them.
        tokenizer: IDEFICS' own, with its `<image>`; built, a folder or a name.
        config: IDEFICS' own, the `config.json` beside the weights.
        vision: without it: a CLIP's vision model or its config; the weights are the checkpoint's.
        language: likewise a LLaMA or its config.
        cross_attn_every_n_layers: checked, where it is given; blocks are before layers 0, n, 2n, ...
        image_size: checked likewise; side of the images in pixels.
        dtype: of the whole model; None: the checkpoint's.

    Raises:
        UserError: a key, shape, option or token that is not accounted for; named.
    """
    clean = translate(state_dict, IDEFICS)
    if config is None:
        if vision is None or language is None:
            raise UserError("from_idefics needs config=..., or vision= and language= with the backbones' configs")
        config = _inferred(clean, getattr(vision, "config", vision), getattr(language, "config", language))
    source: Any = config if isinstance(config, IdeficsConfig) else config_from(IdeficsConfig, _plain(config))
    _check(source)
    checked = (
        ("cross_layer_interval", cross_attn_every_n_layers, source.cross_layer_interval),
        ("vision_config.image_size", image_size, source.vision_config.image_size),
    )
    for name, value, own in checked:
        if value not in (None, own):
            raise UserError(f"IDEFICS' {name} is {own}, not {value}")
    clean = renumber_blocks(clean, source.cross_layer_interval)
    layers = list(range(0, source.num_hidden_layers, source.cross_layer_interval))
    if (block_positions := block_layers(clean)) != layers:
        raise UserError(
            f"the checkpoint has blocks before layers {block_positions}, but cross_layer_interval="
            f"{source.cross_layer_interval} over {source.num_hidden_layers} layers means {layers}"
        )
    to = dtype_of(clean, dtype)
    with empty_weights(to):
        encoder = CLIPVisionModel(clip_config(source))
        lm = LlamaForCausalLM(llama_config(source))
    for name in [name for name in clean if name.startswith("vision_encoder.tower.")]:
        if hasattr(encoder, "vision_model"):  # transformers before 5.23
            clean[name.replace("tower.", "tower.vision_model.", 1)] = clean.pop(name)
    processor = _processor(load_tokenizer(tokenizer), source)
    model = assemble(_flamingo_config(source, lm.config, processor), encoder, lm, processor, to)
    load_clean(model, clean, loaded=())
    return model, processor


def _inferred(clean: Mapping[str, Tensor], clip: Any, llama: Any) -> IdeficsConfig:
    """Return IDEFICS' config from the tensors' shapes and the configs of both backbones.

    A resampler's head is 96 wide, as in the releases, unless its norms of queries and keys say otherwise.
    """
    if not block_layers(clean) or "resampler.latents" not in clean:
        raise UserError("the checkpoint has no resampler or no gated blocks; is it IDEFICS'?")
    norm, gate = clean.get("resampler.layers.0.attn.q_norm.weight"), clean["cross_attn_blocks.0.attn_gate"]
    head_dim = 96 if norm is None else len(norm)
    perceiver = {
        "resampler_depth": len({name.split(".")[2] for name in clean if name.startswith("resampler.layers.")}),
        "resampler_head_dim": head_dim,
        "resampler_n_heads": len(clean["resampler.layers.0.attn.q_proj.weight"]) // head_dim,
        "resampler_n_latents": len(clean["resampler.latents"]),
        "qk_layer_norms_perceiver": norm is not None,
    }
    # What IDEFICS' config calls by the names of transformers' CLIP and LLaMA.
    same = ("image_size", "intermediate_size", "patch_size", "num_hidden_layers", "num_attention_heads")
    vision = {name: getattr(clip, name) for name in (*same, "hidden_act", "layer_norm_eps")}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
    more = ("hidden_act", "max_position_embeddings", "rope_parameters", "pad_token_id", "bos_token_id", "eos_token_id")
    return IdeficsConfig(
        **{name: getattr(llama, name) for name in (*names, *more)},
        vocab_size=len(clean["language_model.model.embed_tokens.weight"]),
        additional_vocab_size=len(clean.get("new_tokens.input_rows", ())),
        cross_layer_interval=llama.num_hidden_layers // len(block_layers(clean)),
        qk_layer_norms="cross_attn_blocks.0.attn.q_norm.weight" in clean,
        alpha_type="vector" if len(gate) > 1 else "float",
        use_resampler=True,
        vision_config={"embed_dim": clip.hidden_size, **vision},
        perceiver_config=perceiver,
    )


def clip_config(source: Any) -> CLIPVisionConfig:
    """Return IDEFICS' encoder as a CLIP of transformers."""
    own = source.vision_config
    same = ("image_size", "intermediate_size", "patch_size", "num_hidden_layers", "num_attention_heads")
    options = {name: getattr(own, name) for name in (*same, "num_channels", "hidden_act", "layer_norm_eps")}
    return CLIPVisionConfig(hidden_size=own.embed_dim, attention_dropout=own.attention_dropout, **options)


def llama_config(source: Any) -> LlamaConfig:
    """Return IDEFICS' language model as a LLaMA of transformers."""
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("hidden_act", "rms_norm_eps", "max_position_embeddings", "rope_parameters", "initializer_range")
    ids = ("pad_token_id", "bos_token_id", "eos_token_id")
    return LlamaConfig(
        **{name: getattr(source, name) for name in (*same, *more, *ids)},
        num_key_value_heads=source.num_attention_heads,
        tie_word_embeddings=False,
    )


def flamingo_options(source: Any) -> dict[str, Any]:
    """Return the switches that make our resampler and blocks those of IDEFICS."""
    perceiver = source.perceiver_config
    return {
        "resampler_config": {
            "depth": perceiver.resampler_depth,
            "heads": perceiver.resampler_n_heads,
            "head_dim": perceiver.resampler_head_dim,
            "latents": perceiver.resampler_n_latents,
            "activation": "relu",
            "qk_norm": "layernorm" if perceiver.qk_layer_norms_perceiver else None,
        },
        "cross_attention_config": {
            "heads": source.num_attention_heads,
            "head_dim": source.hidden_size // source.num_attention_heads,
            "activation": source.hidden_act,
            "gated_ff": True,
            "ff_width": source.intermediate_size,
            "norm": "rmsnorm",
            "norm_eps": source.rms_norm_eps,
            "qk_norm": "rmsnorm" if source.qk_layer_norms else None,
            "gate": "vector" if source.alpha_type == "vector" else "scalar",
        },
        "cross_attn_layers": list(range(0, source.num_hidden_layers, source.cross_layer_interval)),
        "media_reset_token_id": ends if isinstance(ends := source.eos_token_id, int) else ends[0],
    }


def _flamingo_config(source: Any, text_config: LlamaConfig, processor: FlamingoProcessor) -> FlamingoConfig:
    vision = VisionConfig(
        kind="transformers",
        name="idefics",
        arch=clip_config(source).to_dict(),
        image_size=source.vision_config.image_size,
        resize_mode="squash",
        class_token=True,
    )
    extra = source.additional_vocab_size
    return FlamingoConfig(
        vision_config=asdict(vision),
        text_config=text_config,
        image_token_id=processor.image_token_id,
        eoc_token_id=processor.eoc_token_id,
        new_token_ids=list(range(source.vocab_size, source.vocab_size + extra)),
        **flamingo_options(source),
    )


def _check(source: Any) -> None:
    """Refuse the options of IDEFICS that no release uses and this library does not have."""
    wanted = {"use_resampler": True, "tie_word_embeddings": False, "dropout": 0.0}
    for name, value in wanted.items():
        if getattr(source, name) != value:
            raise UserError(f"IDEFICS with {name}={getattr(source, name)} cannot be converted, only {value}")
    if source.additional_vocab_size < 1:
        raise UserError(f"IDEFICS without additional_vocab_size has no row for {IMAGE_TOKEN}")
    if source.num_hidden_layers % source.cross_layer_interval:
        raise UserError(
            f"num_hidden_layers={source.num_hidden_layers} is not a multiple of cross_layer_interval="
            f"{source.cross_layer_interval}"
        )


def _processor(tokenizer: PreTrainedTokenizerBase, source: Any) -> FlamingoProcessor:
    """Return the processor: images are squashed, `<image>` is put between two fake tokens, an utterance's end (in
    the instructed models) or the end of a sequence is the end of a chunk.
    """
    tokenizer = copy.deepcopy(tokenizer)
    known = tokenizer.get_vocab()
    around = FAKE_TOKEN if FAKE_TOKEN in known else None
    end = END_OF_UTTERANCE if END_OF_UTTERANCE in known else tokenizer.eos_token
    last = source.vocab_size + source.additional_vocab_size
    for token in (IMAGE_TOKEN, end):
        if not 0 <= known.get(token, -1) < last:
            raise UserError(f"the tokenizer has no {token} below id {last}; give IDEFICS' own tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(source.pad_token_id)
    transform = ImageTransform(source.vision_config.image_size, mode="squash")
    return FlamingoProcessor(tokenizer, transform, new_tokens=[IMAGE_TOKEN, end], around_image=around)


def _plain(config: Mapping[str, Any] | PreTrainedConfig) -> dict[str, Any]:
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    if values.pop("model_type", "idefics") != "idefics":
        raise UserError("the config beside the checkpoint is not one of IDEFICS (model_type)")
    return values
