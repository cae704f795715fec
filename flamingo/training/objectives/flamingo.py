"""Objective `flamingo`: text given the images before it; what trains lies between a frozen encoder and a frozen LM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flamingo.config import FlamingoConfig
from flamingo.errors import UserError
from flamingo.labels import IGNORED
from flamingo.language.hooks import find_decoder_layers
from flamingo.layers.resampler import FeedForward
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processor import FlamingoProcessor
from flamingo.training.checkpoints.trained_weights import frozen_fingerprints
from flamingo.training.config import ModelConfig, VisionSource
from flamingo.training.distributed.fsdp import FsdpUnit, Processes
from flamingo.training.distributed.units import flamingo_units
from flamingo.training.objectives import build as builders
from flamingo.training.objectives import lora
from flamingo.training.objectives.protocol import BatchShape, Setup
from flamingo.vision.features import FrozenFeatures, features_key, folder_key
from flamingo.vision.image_store import ImageStore

MODEL_INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_counts", "frame_counts", "phi", "sequence_ids")


class FlamingoObjective:
    """Next-token prediction on text given the images before it (paper, equation 1)."""

    host_inputs: ClassVar[frozenset[str]] = frozenset(MODEL_INPUTS) - {"pixel_values"} | {"labels"}

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the number of labelled tokens."""
        return {"text": int((batch["labels"][:, 1:] != IGNORED).sum())}

    def sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum of cross-entropies over the labelled tokens; the model computes no other logits."""
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        loss: Tensor = model(**inputs, labels=batch["labels"], num_items_in_batch=1, use_cache=False).loss
        return {"text": loss}

    def fsdp_units(self, model: Any) -> Iterator[FsdpUnit]:
        """Return the units of a Flamingo."""
        return flamingo_units(model)

    def compiled_layers(self, model: Any) -> Iterator[nn.Module]:
        """Return the decoder layers, and the feed-forwards of the gated blocks and of the resampler."""
        yield from find_decoder_layers(model.language_model, model.config.decoder_layers_path)
        yield from (module for module in model.modules() if isinstance(module, FeedForward))

    def largest_batch(self, model: Any, rows: int, shape: BatchShape) -> dict[str, Tensor]:
        """Return `rows` rows with all their images and a label on every token.

        Where the dataset packs, `shape.together` of them share a row, as `data.batches.packing` lays them out.
        """
        together = min(shape.together, rows)
        slots = -(-rows // together) * together  # the last packed row may have room left
        ids = torch.zeros(slots, shape.tokens, dtype=torch.long)
        sequence = (torch.arange(slots) % together + 1).where(torch.arange(slots) < rows, 0)
        sequence = sequence[:, None].repeat(1, shape.tokens).view(-1, together * shape.tokens)
        labels = torch.zeros_like(sequence).where(sequence > 0, IGNORED)
        batch = {"attention_mask": (sequence > 0).long(), "labels": labels}
        if together > 1:
            batch["sequence_ids"] = sequence
        images = min(shape.images, shape.tokens)
        ids[:rows, torch.arange(images) * (shape.tokens // max(1, images))] = model.config.image_token_id
        ids = ids.view(sequence.shape)
        size = model.config.vision.image_size
        pixels = torch.empty(rows * images, shape.frames, 3, size, size, dtype=torch.uint8, device="meta")
        is_image = ids == model.config.image_token_id
        phi = is_image.cumsum(1) * (sequence > 0)
        return {**batch, "input_ids": ids, "pixel_values": pixels, "image_counts": is_image.sum(1), "phi": phi}


def build(model: ModelConfig, run_dir: Path, processes: Processes, texts: Callable[[], Iterable[str]]) -> Setup:
    """Build a Flamingo around its backbones, or load all of it from the folder `model.init`."""
    if model.init:
        flamingo = FlamingoForConditionalGeneration.from_pretrained(model.init)
        processor = FlamingoProcessor.from_pretrained(model.init)
    else:
        flamingo, processor = builders.build_flamingo(model)
    builders.refuse_quantized(flamingo.language_model)
    _freeze(flamingo, model)
    frozen = frozen_fingerprints(flamingo, processor.tokenizer)  # before the adapters, which change the LM's keys
    adapters = _add_adapters(flamingo, model)
    if model.vision.cache:
        frozen["features"] = _keep_features(flamingo, processor, model.vision)

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        merged = weights if adapters is None else lora.merge(weights, adapters)
        builders.save_flamingo(flamingo, processor, merged, folder)
        if adapters is not None:
            lora.save_adapters(weights, adapters, "language_model.", folder / lora.ADAPTER)

    return Setup(
        flamingo,
        FlamingoObjective(),
        part_of=flamingo.part_of,
        collate=lambda classes: classes.FlamingoCollate(processor),
        export=export,
        processor=processor,
        frozen=frozen,
    )


def _keep_features(
    flamingo: FlamingoForConditionalGeneration, processor: FlamingoProcessor, vision: VisionSource
) -> str:
    """Have the frozen encoder encode each image once; return the key of what it gives."""
    key = features_key(flamingo.vision_encoder, processor.image_transform)
    limit = int(vision.cache_gb * 1e9)
    store = ImageStore(Path(vision.cache_dir), folder_key(key), limit) if vision.cache == "disk" else None
    flamingo.vision_encoder.features = FrozenFeatures(store, limit)
    return key[:16]


def build_on_meta(model: ModelConfig, processes: int) -> tuple[nn.Module, FlamingoObjective]:
    """Build the same without memory.

    Raises:
        UserError: `model.init` is not a folder with a model.
    """
    init = model.init
    if init and not (Path(init) / "config.json").is_file():
        raise UserError(
            f"model.init={init} is not a model folder: config.json is missing; give one that a training run wrote"
        )
    described = FlamingoConfig.from_pretrained(init) if init else builders.flamingo_shape(model)
    with torch.device("meta"):
        flamingo = FlamingoForConditionalGeneration(described)
        _freeze(flamingo, model)
        _add_adapters(flamingo, model)
    return flamingo, FlamingoObjective()


def _freeze(flamingo: FlamingoForConditionalGeneration, model: ModelConfig) -> None:
    policy = asdict(model.freeze)
    flamingo.freeze({**policy, "language": "frozen"} if policy["language"] == "lora" else policy)


def _add_adapters(flamingo: FlamingoForConditionalGeneration, model: ModelConfig) -> Any:
    """Add adapters to the LM where the config asks for them; return peft's config, or None."""
    if model.freeze.language != "lora":
        return None
    path = flamingo.config.decoder_layers_path
    return lora.add_adapters(flamingo.language_model, **asdict(model.lora), layers_path=path)
