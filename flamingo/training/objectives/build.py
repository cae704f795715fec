"""Builds what a run trains, from plain arguments, and writes what it has become.

Each objective gives a module, its `part_of` (parameter name to part of the model, for freezing and learning rates), the
FSDP2 units, and a folder in the format of the library it came from: open_clip's local folder, transformers'
`save_pretrained`, ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
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
from flamingo.training.config import ModelConfig
from flamingo.training.objectives.losses import ContrastiveObjective
from flamingo.vision.encoder import build_open_clip, describe_tower

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, with an end of text and a padding token."""
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
    """A tokenizer by folder or hub name; a missing padding token becomes the end of text.

    Raises:
        UserError: it is neither a folder here nor can the hub be reached, or it has no end of text.
    """
    tokenizer: PreTrainedTokenizerBase = from_hub(AutoTokenizer, name, "tokenizer")
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {name} has no end-of-text token; set its eos_token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class PairTokenizer:
    """Texts to `(B, context)` ids for open_clip's text tower: text, end of text, padding."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
        """`context_length` counts the end of text."""
        self._tokenizer, self._context = tokenizer, context_length

    def __call__(self, texts: list[str]) -> Tensor:
        """Cuts what is too long, keeping the end of text, from which the tower reads its feature."""
        eos, pad = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        rows = torch.full((len(texts), self._context), pad, dtype=torch.long)
        for row, ids in zip(rows, self._tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
            kept = [*ids[: self._context - 1], eos]
            row[: len(kept)] = torch.tensor(kept)
        return rows


def build_contrastive(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[nn.Module, dict[str, Any]]:
    """An open_clip model of random weights from `{embed_dim, vision_cfg, text_cfg}`, completed by the tokenizer's ids.

    Returns the model and the completed config. The temperature becomes a vector of one element: FSDP2 has no scalars.

    Raises:
        UserError: open_clip does not accept the config.
    """
    text = {
        "vocab_size": len(tokenizer),
        "pool_type": "eos",
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        **config.get("text_cfg", {}),
    }
    full = {"embed_dim": config.get("embed_dim"), "vision_cfg": config.get("vision_cfg"), "text_cfg": text}
    try:
        model = open_clip.CLIP(**full)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"model.vision.config is not accepted by open_clip ({error}): compare its model configs"
        ) from error
    model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))
    return model, full


def export_contrastive(
    state: dict[str, Tensor], config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Writes open_clip's own local folder: `open_clip.create_model("local-dir:FOLDER")` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in state.items()}
    tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    save_file(tensors, str(folder / "open_clip_model.safetensors"))
    tokenizer.save_pretrained(str(folder))
    mean, std = list(ContrastiveObjective.MEAN), list(ContrastiveObjective.STD)
    preprocess = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "squash"}
    description = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(description, indent=2))


def build_language(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A causal LM of random weights from `{model_type, ...}`; its vocabulary is the tokenizer's.

    Raises:
        UserError: no such `model_type`, or transformers does not accept the config.
    """
    fields = {key: value for key, value in config.items() if key != "model_type"}
    if "model_type" not in config:
        raise UserError("model.language.config needs a model_type, such as llama or gpt2")
    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    try:
        described = AutoConfig.for_model(config["model_type"], **{"vocab_size": len(tokenizer), **ids, **fields})
        return AutoModelForCausalLM.from_config(described)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.language.config is not accepted by transformers: {error}") from error


def build_flamingo(model: ModelConfig) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """A Flamingo around the backbones that the config names, or around random ones of the shapes it describes.

    Raises:
        UserError: a backbone cannot be had, or an option does not fit.
    """
    vision, language = model.vision, model.language
    tower: Any = vision.name
    options: dict[str, Any] = {}
    if vision.name is None:
        arch = open_clip_arch(vision.config or {})
        tower = build_open_clip(arch)
        size = arch["vision_cfg"].get("image_size", 224)
        options = {"image_size": size, "vision_options": {"kind": "open_clip", "arch": arch}}
    lm: Any = language.name
    if language.name is None:
        lm = build_language(language.config or {}, load_tokenizer(str(language.tokenizer)))
    built: tuple[FlamingoForConditionalGeneration, FlamingoProcessor] = FlamingoForConditionalGeneration.from_backbones(
        tower,
        lm,
        vision_pretrained=vision.pretrained,
        tokenizer=language.tokenizer,
        cross_attn_every_n_layers=model.cross_attn_every_n_layers,
        resampler=asdict(model.resampler),
        cross_attention=asdict(model.cross_attention),
        **options,
    )
    if vision.resize_mode:  # of the processor, and of the model's config, which is what a saved folder remembers
        flamingo, processor = built
        processor.image_transform = replace(processor.image_transform, mode=vision.resize_mode)
        flamingo.config.vision_config.resize_mode = vision.resize_mode
    return built


def load_flamingo(folder: str) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """A whole Flamingo and its processor from a folder: converted, exported by a run, or saved by hand.

    Raises:
        UserError: the folder holds none.
    """
    model: FlamingoForConditionalGeneration = FlamingoForConditionalGeneration.from_pretrained(folder)
    processor: FlamingoProcessor = FlamingoProcessor.from_pretrained(folder)
    return model, processor


def save_flamingo(
    model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, weights: dict[str, Tensor], folder: Path
) -> None:
    """Writes a whole Flamingo of these weights; where they have several precisions, its config says fp32.

    transformers loads all weights in the config's one precision, for which it takes that of the first weight: frozen
    bf16 would round what has trained in fp32.
    """
    mixed = len({value.dtype for value in weights.values() if value.is_floating_point()}) > 1
    model.save_pretrained(str(folder), state_dict=weights)  # which empties `weights`
    processor.save_pretrained(str(folder))
    if mixed:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "float32"}, indent=2) + "\n")


def open_clip_arch(config: dict[str, Any]) -> dict[str, Any]:
    """The part of an open_clip model config that describes its image tower."""
    return {key: config.get(key, False) for key in ("embed_dim", "vision_cfg", "quick_gelu")}


def flamingo_shape(model: ModelConfig) -> FlamingoConfig:
    """The config of a Flamingo from the shapes in a run's config alone: no weights, no tokenizer, no network.

    Built on the meta device it costs no memory; the ids of its two new tokens follow the LM's table.

    Raises:
        UserError: `model.vision.config` or `model.language.config` is missing.
    """
    if not (model.vision.config and model.language.config):
        raise UserError("a shape needs model.vision.config and model.language.config")
    arch = open_clip_arch(model.vision.config)
    size = arch["vision_cfg"].get("image_size", 224)
    with torch.device("meta"):
        vision = describe_tower(build_open_clip(arch), name="", image_size=size, kind="open_clip", arch=arch)
    vocab = int(model.language.config["vocab_size"])
    return FlamingoConfig(
        vision_config=asdict(vision),
        text_config=dict(model.language.config),
        resampler_config=asdict(model.resampler),
        cross_attention_config=asdict(model.cross_attention),
        cross_attn_every_n_layers=model.cross_attn_every_n_layers,
        image_token_id=vocab,
        eoc_token_id=vocab + 1,
    )
