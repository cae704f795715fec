"""Objective `flamingo`: text given the images before it; what trains lies between a frozen encoder and a frozen LM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flamingo import soft_prompts
from flamingo.config import FlamingoConfig
from flamingo.errors import UserError
from flamingo.labels import IGNORED
from flamingo.language.hooks import SoftPrompts, find_decoder_layers
from flamingo.layers.resampler import FeedForward
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processor import FlamingoProcessor
from flamingo.training.checkpoints.trained_weights import FrozenWeights, frozen_fingerprints
from flamingo.training.distributed.fsdp import FsdpUnit, Processes
from flamingo.training.distributed.units import flamingo_units
from flamingo.training.model_config import ModelConfig, SoftPromptOptions, VisionSource
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
    if model.chat_template is not None:
        processor.chat_template = model.chat_template
        end = processor.turns().end_id  # refuses a template that training cannot use, before anything else is done
        own = flamingo.generation_config.eos_token_id
        own = own if isinstance(own, list) else [] if own is None else [own]
        flamingo.generation_config.eos_token_id = [*own, *({end} - {*own})]  # the saved model ends its answers
    builders.refuse_quantized(flamingo.language_model)
    _freeze(flamingo, model)
    frozen = frozen_fingerprints(flamingo, processor.tokenizer)  # before what is added, which changes keys
    _add_soft_prompt(flamingo, processor, model.soft_prompt)
    adapters = _add_adapters(flamingo, model)
    if model.vision.cache:
        frozen["features"] = _keep_features(flamingo, processor, model.vision)
    unchanged = FrozenWeights(flamingo) if processes.is_main else None  # which alone exports

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        if unchanged is not None and (said := unchanged.require_unchanged(weights)):
            print(said, flush=True)
        merged = lora.merge(weights, adapters) if adapters else weights
        prompt: list[Any] = []
        if model.soft_prompt.given:  # before `merged` is emptied
            rows = soft_prompts.rows_of(flamingo, soft_prompts.DEFAULT, merged.get(soft_prompts.KEY))
            prompt = [rows, folder / soft_prompts.SOFT_PROMPT_FILE, soft_prompts.weights_fingerprint(merged)]
        builders.save_flamingo(flamingo, processor, merged, folder)
        if "language_model." in adapters:
            lora.save_adapters(weights, adapters["language_model."], "language_model.", folder / lora.ADAPTER)
        if prompt:
            soft_prompts.write_soft_prompt(*prompt)

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
        if model.soft_prompt.given:  # how many a text gives, its tokenizer says; not more than it has characters
            number = model.soft_prompt.tokens or len(model.soft_prompt.text or "")
            flamingo.new_tokens.soft = SoftPrompts(number, flamingo.new_tokens.input_rows.shape[1])
        _add_adapters(flamingo, model)
    return flamingo, FlamingoObjective()


def _freeze(flamingo: FlamingoForConditionalGeneration, model: ModelConfig) -> None:
    policy = asdict(model.freeze)
    flamingo.freeze({part: "frozen" if value == "lora" else value for part, value in policy.items()})


def _add_soft_prompt(
    flamingo: FlamingoForConditionalGeneration, processor: FlamingoProcessor, options: SoftPromptOptions
) -> None:
    if not options.given:
        return
    if soft_prompts.DEFAULT in processor.soft_prompts:
        raise UserError(
            "the model of model.init has a soft prompt already: to train it on, leave model.soft_prompt out and set "
            "model.freeze.new_tokens=train"
        )
    soft_prompts.new_soft_prompt(flamingo, processor, tokens=options.tokens, text=options.text)
    assert flamingo.new_tokens.soft is not None
    flamingo.new_tokens.soft.requires_grad_(True)  # whatever the policy says of the rows beside it


def _add_adapters(flamingo: FlamingoForConditionalGeneration, model: ModelConfig) -> dict[str, Any]:
    """Add adapters where the config asks for them; return peft's configs by the beginning of their weights' names."""
    adapters = {}
    if model.freeze.language == "lora":
        path = flamingo.config.decoder_layers_path
        lm = flamingo.language_model
        adapters["language_model."] = lora.add_adapters(lm, **asdict(model.lora), layers_path=path)
    if model.freeze.cross_attention == "lora":
        blocks, rank, alpha = flamingo.cross_attn_blocks, model.lora.rank, model.lora.alpha
        adapters["cross_attn_blocks."] = lora.add_block_adapters(blocks, rank=rank, alpha=alpha)
    return adapters
