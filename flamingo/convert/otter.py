"""Otter's checkpoints: OpenFlamingo's model with other names, and everything in the file.

The encoder is transformers' CLIP, whose last hidden state is what OpenFlamingo takes from open_clip; the
resampler may have frame embeddings (OTTER-Video); the tokenizer has one more new token, `<answer>`; the language
model's config is inside Otter's, partly in the words of code that would have to be downloaded, which is not run here.
Otter's own decoding with a cache forgets the image after one token; that is not reproduced.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, CLIPVisionConfig, MptConfig, PreTrainedConfig
from transformers.models.mpt.configuration_mpt import MptAttentionConfig

from flamingo.convert.build import empty_weights
from flamingo.convert.files import config_from
from flamingo.convert.openflamingo import Converted, from_openflamingo
from flamingo.errors import UserError

ANSWER = "<answer>"
MPT_FIXED = {"qk_ln": False, "alibi": True, "prefix_lm": False, "logit_scale": None, "no_bias": True}
"""What transformers' MPT does whatever its config says."""


def from_otter(state_dict: Mapping[str, Tensor], **options: Any) -> Converted:
    """Return (model, processor) of an Otter checkpoint; options as of `from_openflamingo`.

    `language` is usually the LM's config, since the checkpoint holds its weights.
    """
    model, processor = from_openflamingo(state_dict, **{"extra_tokens": (ANSWER,), **options})
    if ANSWER in processor.new_tokens:
        processor.chat_template = "otter"  # whatever its language model's is
    return model, processor


def backbones_of(
    config: Mapping[str, Any], *, vision: str | None = None, language: str | None = None
) -> dict[str, Any]:
    """Return what `from_otter` needs beside the weights, from the `config.json` of Otter or of its authors' Flamingo.

    Raises:
        UserError: it is neither's, or a backbone is of an unsupported kind.
    """
    kind = config.get("model_type")
    parts = (config.get("text_config"), config.get("vision_config"))
    if kind not in ("otter", "flamingo") or not all(isinstance(part, Mapping) for part in parts):
        raise UserError(f"config.json is not Otter's: its model_type is {kind!r}")
    encoder: Any = vision
    size = None
    if vision is None:
        source = dict(config["vision_config"])
        if source.get("model_type") != "clip_vision_model":
            raise UserError(f"Otter's encoder is {source.get('model_type')!r}; only clip_vision_model is supported")
        clip = config_from(CLIPVisionConfig, _known(source, CLIPVisionConfig))
        size = clip.image_size
        with empty_weights(torch.float32):
            encoder = AutoModel.from_config(clip)
    return {
        "vision": encoder,
        "image_size": size,
        "language": language or _language(dict(config["text_config"])),
        "extra_tokens": (ANSWER,) if kind == "otter" else (),
    }


def _language(source: dict[str, Any]) -> PreTrainedConfig:
    """Return the LM's config in transformers' (or this library's) words."""
    kind = "mosaic_gpt" if "MosaicGPT" in (source.get("architectures") or ()) else str(source.get("model_type"))
    if kind == "mpt":
        attention = dict(source.get("attn_config") or {})
        given = {**attention, **{name: source.get(name) for name in ("logit_scale", "no_bias")}}
        for name, value in MPT_FIXED.items():
            if given.get(name, value) != value:
                raise UserError(f"Otter's MPT has {name}={given[name]}; transformers' MPT has only {value}")
        own = _known(source, MptConfig) | {"attn_config": _known(attention, MptAttentionConfig)}
        return config_from(MptConfig, own)
    if kind not in CONFIG_MAPPING:
        raise UserError(f"Otter's language model is {kind!r}, which is not supported")
    return config_from(CONFIG_MAPPING[kind], _known(source, CONFIG_MAPPING[kind]))


def _known(source: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Return the values that this config class has a field for; the rest are how 2023's transformers generated."""
    names = {*inspect.signature(kind).parameters, "rope_theta", "rope_scaling"} - {"attn_config", "kwargs"}
    names -= set(PreTrainedConfig.__annotations__) - {"pad_token_id", "bos_token_id", "eos_token_id"}
    return {name: value for name, value in source.items() if name in names and value is not None}
