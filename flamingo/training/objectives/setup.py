"""What differs between the objectives, gathered in one small record: the engine in `train.py` sees nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flamingo.backbones import load_language
from flamingo.errors import UserError
from flamingo.language.embeddings import embedding_table, table_shape
from flamingo.processor import FlamingoProcessor, ImageTransform
from flamingo.training.checkpoints.trained_weights import fingerprint, manifest_of
from flamingo.training.config import ModelConfig, RunConfig
from flamingo.training.distributed.fsdp import Processes, Strategy, compile_layers, shard, store
from flamingo.training.distributed.units import fsdp_units
from flamingo.training.objectives import build, lora
from flamingo.training.objectives.losses import (
    ContrastiveObjective,
    FlamingoObjective,
    LanguageObjective,
    Objective,
)


@dataclass(frozen=True)
class Setup:
    """One objective, ready to train."""

    model: nn.Module
    objective: Objective
    part_of: Callable[[str], str]
    """Parameter name to part of the model."""
    export: Callable[[dict[str, Tensor], Path], Any]
    """Writes the whole state dict into a folder."""
    tokenizer: PreTrainedTokenizerBase
    processor: FlamingoProcessor | None = None
    pairs: build.PairTokenizer | None = None
    transform: ImageTransform | None = None
    frozen: dict[str, str] = field(default_factory=dict)
    """Frozen part to a fingerprint of its weights: they are not in a checkpoint, so it must say whose they were."""


def language_setup(
    model: ModelConfig, run_dir: Path, processes: Processes, texts: Callable[[], Iterable[str]]
) -> Setup:
    """A causal LM on the text of documents, or adapters in one, with a tokenizer of its own where none is named."""
    language = model.language
    if language.name:
        lm, tokenizer = load_language(language.name, language.tokenizer)
        rows, _ = table_shape(embedding_table(lm))
        if len(tokenizer) > rows:
            raise UserError(
                f"the tokenizer of {language.tokenizer or language.name} has {len(tokenizer)} tokens, more than the "
                f"{rows} embeddings of {language.name}: set model.language.tokenizer to the one it was trained with"
            )
    elif language.tokenizer:
        tokenizer = build.load_tokenizer(language.tokenizer)
    else:
        folder = run_dir / "tokenizer"
        if processes.is_main and not folder.exists():
            build.train_tokenizer(texts(), language.vocab_size).save_pretrained(str(folder))
        processes.wait()  # the others, until it is written
        tokenizer = build.load_tokenizer(str(folder))
    if not language.name:
        lm = build.build_language(language.config or {}, tokenizer)
    adapters: Any = None
    frozen: dict[str, str] = {}
    if model.freeze.language == "lora":
        frozen = {"language": fingerprint(lm)}  # of the LM as it was: adapters change its keys
        adapters = add_lora(lm.requires_grad_(False), model)

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        lm.save_pretrained(str(folder), state_dict=weights if adapters is None else lora.merge(weights, adapters))
        tokenizer.save_pretrained(str(folder))
        if adapters is not None:
            lora.save_adapters(weights, adapters, "", folder / lora.ADAPTER)

    return Setup(lm, LanguageObjective(), lambda name: "language", export, tokenizer, frozen=frozen)


def contrastive_setup(
    model: ModelConfig, run_dir: Path, processes: Processes, texts: Callable[[], Iterable[str]]
) -> Setup:
    """An open_clip model on pairs; its image tower is the encoder that a flamingo run freezes."""
    tokenizer = build.load_tokenizer(str(model.language.tokenizer))
    clip, described = build.build_contrastive(model.vision.config or {}, tokenizer)
    return Setup(
        clip,
        ContrastiveObjective(processes.rank, processes.size),
        lambda name: "vision",
        lambda weights, folder: build.export_contrastive(weights, described, tokenizer, folder),
        tokenizer,
        pairs=build.PairTokenizer(tokenizer, int(described["text_cfg"].get("context_length", 77))),
        transform=ImageTransform(
            size=int(described["vision_cfg"]["image_size"]),
            mean=ContrastiveObjective.MEAN,
            std=ContrastiveObjective.STD,
            mode="squash",
        ),
    )


def flamingo_setup(
    model: ModelConfig, run_dir: Path, processes: Processes, texts: Callable[[], Iterable[str]]
) -> Setup:
    """Frozen backbones, and between them what trains; or all of it from a folder."""
    flamingo, processor = build.load_flamingo(model.init) if model.init else build.build_flamingo(model)
    policy = asdict(model.freeze)
    with_adapters = policy["language"] == "lora"
    flamingo.freeze({**policy, "language": "frozen"} if with_adapters else policy)
    frozen = manifest_of(flamingo)["fingerprints"]  # of the LM as it was: adapters change its keys
    path = flamingo.config.decoder_layers_path
    adapters = add_lora(flamingo.language_model, model, path) if with_adapters else None

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        merged = weights if adapters is None else lora.merge(weights, adapters)
        build.save_flamingo(flamingo, processor, merged, folder)
        if adapters is not None:
            lora.save_adapters(weights, adapters, "language_model.", folder / lora.ADAPTER)

    return Setup(
        flamingo,
        FlamingoObjective(),
        flamingo.part_of,
        export,
        processor.tokenizer,
        processor=processor,
        transform=processor.image_transform,
        frozen=frozen,
    )


def add_lora(lm: PreTrainedModel, model: ModelConfig, layers_path: str | None = None) -> Any:
    """Adapters in the LM as the config describes them; returns peft's config."""
    options = model.lora
    return lora.add_adapters(
        lm, rank=options.rank, alpha=options.alpha, targets=options.targets, layers_path=layers_path
    )


def strategy_of(run: RunConfig, processes: int) -> Strategy | None:
    """How a run's config wants the weights to lie; None: as they are, on one process.

    Hybrid sharding keeps a copy on each machine unless `run.sharding.size` says otherwise.
    """
    needs_none = processes == 1 and run.precision == "fp32" and not run.sharding.cpu_offload
    if run.parallel == "none" or (run.parallel == "auto" and needs_none):
        return None
    machine = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    return Strategy(
        precision=run.precision,
        frozen=run.sharding.frozen,
        frozen_dtype=run.sharding.frozen_dtype(run.precision),
        shard_size=(run.sharding.size or machine) if run.parallel == "hybrid" else 0,
        offload=run.sharding.cpu_offload,
        keep_gathered=run.sharding.keep_gathered,
        sync_every_piece=run.sharding.sync_every_micro_batch,
    )


def place(model: nn.Module, run: RunConfig, processes: Processes, strategy: Strategy | None) -> nn.Module:
    """The model ready to train: recomputing, compiled and on its devices, in this order. What trains is fp32."""
    if run.activation_checkpointing:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    if run.compile:
        compile_layers(model)
    if strategy is None:
        store(model.to(processes.device), torch.float32)
    else:
        shard(model, fsdp_units(model), processes, strategy)
    return model


SETUPS = {"language": language_setup, "contrastive": contrastive_setup, "flamingo": flamingo_setup}
