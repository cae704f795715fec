"""Builders that objectives share: tokenizers, language models, and Flamingos from shapes, backbones or folders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from flamingo.config import FlamingoConfig
from flamingo.errors import UserError
from flamingo.hub import from_hub
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processor import FlamingoProcessor
from flamingo.storage import is_quantized
from flamingo.training.model_config import ModelConfig, VisionSource
from flamingo.vision.encoder import build_open_clip, describe_encoder

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens, with an end of text and a padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PADDING)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer by folder or hub name; a missing padding token becomes the end of text.

    Raises:
        UserError: it is not a folder and the hub cannot be reached, or it has no end-of-text token.
    """
    tokenizer: PreTrainedTokenizerBase = from_hub(AutoTokenizer, name, "tokenizer")
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {name} has no end-of-text token; set its eos_token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_language(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Build a causal LM of random weights from `{model_type, ...}`; its vocabulary is the tokenizer's.

    Raises:
        UserError: no such `model_type`, or transformers does not accept the config.
    """
    fields = {key: value for key, value in config.items() if key != "model_type"}
    if "model_type" not in config:
        raise UserError("model.language.config needs a model_type, such as llama or gpt2")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    try:
        described = AutoConfig.for_model(config["model_type"], **{"vocab_size": len(tokenizer), **ids, **fields})
        return AutoModelForCausalLM.from_config(described)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.language.config is not accepted by transformers: {error}") from error


def refuse_quantized(lm: PreTrainedModel) -> None:
    """Raise a UserError where the LM's weights are packed: they can neither be sharded nor take merged adapters."""
    if is_quantized(lm):
        raise UserError(
            "the language model is quantised, which train.py does not train beside: give one that is not, with "
            "model.freeze.language=lora and run.precision=bf16, or use the Trainer (docs/finetune.md, QLoRA)"
        )


def build_flamingo(model: ModelConfig) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Build a Flamingo around the backbones that the config names, or around random ones of the shapes it describes.

    Raises:
        UserError: a backbone cannot be loaded, or an option does not fit.
    """
    vision, language = model.vision, model.language
    encoder: Any = vision.name
    size, options = vision.image_size, token_options(vision)
    if vision.name is None:
        arch = open_clip_arch(vision.config or {})
        encoder = build_open_clip(arch)
        size = arch["vision_cfg"].get("image_size", 224)
        options |= {"kind": "open_clip", "arch": arch}
    lm: Any = language.name
    if language.name is None:
        lm = build_language(language.config or {}, load_tokenizer(str(language.tokenizer)))
    built: tuple[FlamingoForConditionalGeneration, FlamingoProcessor] = FlamingoForConditionalGeneration.from_backbones(
        encoder,
        lm,
        vision_pretrained=vision.pretrained,
        tokenizer=language.tokenizer,
        add_bos_token=language.add_bos_token,
        cross_attn_every_n_layers=model.cross_attn_every_n_layers or 1,
        cross_attn_layers=model.cross_attn_layers,
        connector=model.connector,
        resampler=model.connector_config(),
        cross_attention=asdict(model.cross_attention),
        image_size=size,
        vision_options=options,
        seed=torch.initial_seed(),  # the run's
    )
    if vision.resize_mode:  # of the processor, and of the model's config, which is what a saved folder remembers
        flamingo, processor = built
        processor.image_transform = replace(processor.image_transform, mode=vision.resize_mode)
        flamingo.config.vision_config.resize_mode = vision.resize_mode
    return built


def save_flamingo(
    model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, weights: dict[str, Tensor], folder: Path
) -> None:
    """Write a whole Flamingo of these weights, each in its own precision."""
    model.save_pretrained(str(folder), state_dict=weights)  # which empties `weights`
    processor.save_pretrained(str(folder))


def token_options(vision: VisionSource) -> dict[str, Any]:
    """Return which tokens of the encoder the config asks for, where it says so."""
    asked = {"class_token": vision.class_token, "final_norm": vision.final_norm}
    return {key: value for key, value in asked.items() if value is not None}


def open_clip_arch(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an open_clip model config that describes its image encoder."""
    return {key: config.get(key, False) for key in ("embed_dim", "vision_cfg", "quick_gelu")}


def flamingo_shape(model: ModelConfig) -> FlamingoConfig:
    """Return the config of a Flamingo from the shapes in a run's config alone: no weights, no tokenizer, no network.

    Built on the meta device it costs no memory; the ids of its two new tokens follow the LM's table.

    Raises:
        UserError: `model.vision.config` or `model.language.config` is missing.
    """
    if not (model.vision.config and model.language.config):
        raise UserError("a shape needs model.vision.config and model.language.config")
    arch = open_clip_arch(model.vision.config)
    size = arch["vision_cfg"].get("image_size", 224)
    described = {"image_size": size, "kind": "open_clip", "arch": arch, **token_options(model.vision)}
    with torch.device("meta"):
        vision = describe_encoder(build_open_clip(arch), name="", **described)
    vocab = int(model.language.config["vocab_size"])
    return FlamingoConfig(
        vision_config=asdict(vision),
        text_config=dict(model.language.config),
        connector=model.connector,
        resampler_config=model.connector_config(),
        cross_attention_config=asdict(model.cross_attention),
        cross_attn_every_n_layers=model.cross_attn_every_n_layers or 1,
        cross_attn_layers=model.cross_attn_layers,
        image_token_id=vocab,
        eoc_token_id=vocab + 1,
    )
