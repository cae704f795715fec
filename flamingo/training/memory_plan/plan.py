"""`plan=true`: a run's config to the memory of its processes, in words; refuses what cannot fit."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from flamingo.backbones import OPEN_CLIP_CONFIG
from flamingo.config import FlamingoConfig
from flamingo.errors import UserError
from flamingo.hub import from_hub
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.training.config import ModelConfig, TrainConfig
from flamingo.training.memory_plan.dry_run import PARTS, Memory, plan_step
from flamingo.training.objectives.build import build_contrastive, flamingo_shape, load_tokenizer
from flamingo.training.objectives.losses import ContrastiveObjective, FlamingoObjective, LanguageObjective, Objective
from flamingo.training.objectives.setup import add_lora, strategy_of

GIB = 2**30
RESERVED_GIB, LOST = 1.5, 0.05
"""Memory of a GPU that no tensor gets (context, NCCL, kernels), and the share of the rest lost between blocks."""


@dataclass(frozen=True)
class Rows:
    """The largest batch of a dataset on all processes together."""

    rows: int
    tokens: int
    images: int
    """Of a row."""
    frames: int = 1
    together: int = 1
    """Rows of the longest length that share one where the dataset packs."""


def complete(model: ModelConfig) -> ModelConfig:
    """The same with the shapes of its backbones, read from the configs beside their weights where YAML has none.

    Raises:
        UserError: a shape cannot be had without the weights.
    """
    vision, language = model.vision, model.language
    if vision.config is None and vision.name is not None:
        described = Path(vision.name) / OPEN_CLIP_CONFIG
        if described.is_file():
            document = json.loads(described.read_text())
            vision = replace(vision, config=document.get("model_cfg", document))
        elif vision.name in open_clip.list_models():
            vision = replace(vision, config=open_clip.get_model_config(vision.name))
        else:
            raise UserError(f"a plan needs the shape of {vision.name}: give model.vision.config")
    if language.config is None and language.name is not None:
        language = replace(language, config=from_hub(AutoConfig, language.name, "language model").to_dict())
    elif language.config is not None and "vocab_size" not in language.config:
        language = replace(language, config={**language.config, "vocab_size": language.vocab_size})
    return replace(model, vision=vision, language=language)


def meta_model(config: TrainConfig, processes: int = 1) -> tuple[nn.Module, Objective]:
    """What the run would train, without memory, and its objective as the first of `processes` has it.

    Raises:
        UserError: a missing shape; for objective contrastive a missing tokenizer, which says how many rows there are.
    """
    shape = complete(config.model)
    if config.objective == "contrastive":
        tokenizer = load_tokenizer(str(shape.language.tokenizer))
        with torch.device("meta"):
            return build_contrastive(shape.vision.config or {}, tokenizer)[0], ContrastiveObjective(0, processes)
    if config.objective == "language":
        fields = dict(shape.language.config or {})
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
            if config.model.freeze.language == "lora":
                add_lora(lm.requires_grad_(False), config.model)
        return lm, LanguageObjective()
    init = config.model.init
    if init and not (Path(init) / "config.json").is_file():
        raise UserError(
            f"model.init={init} holds no model: config.json is missing; give a folder that a run has written"
        )
    described = FlamingoConfig.from_pretrained(init) if init else flamingo_shape(shape)
    with torch.device("meta"):
        model = FlamingoForConditionalGeneration(described)
        policy = asdict(config.model.freeze)
        with_adapters = policy["language"] == "lora"
        model.freeze({**policy, "language": "frozen"} if with_adapters else policy)
        if with_adapters:
            add_lora(model.language_model, config.model, model.config.decoder_layers_path)
    return model, FlamingoObjective()


def batch_of(model: nn.Module, rows: int, shape: Rows) -> dict[str, Tensor]:
    """A batch in which every row is as long as it may be, has all its images and a label on every token.

    Where the dataset packs, `shape.together` of them share a row, as `data.batches.packing` lays them out.

    Integers are real and lie on the CPU; images are on the meta device.
    """
    if isinstance(model, CLIP):
        side = model.visual.image_size
        shape_of_one = (side, side) if isinstance(side, int) else tuple(side)
        text = torch.full((rows, model.context_length), model.vocab_size - 1)
        return {"image": torch.empty((rows, 3, *shape_of_one), dtype=torch.uint8, device="meta"), "text": text}
    together = min(shape.together, rows) if isinstance(model, FlamingoForConditionalGeneration) else 1
    places = -(-rows // together) * together  # the last packed row may have room left
    ids = torch.zeros(places, shape.tokens, dtype=torch.long)
    sequence = (torch.arange(places) % together + 1).where(torch.arange(places) < rows, 0)
    sequence = sequence[:, None].repeat(1, shape.tokens).view(-1, together * shape.tokens)
    batch = {"attention_mask": (sequence > 0).long(), "labels": torch.zeros_like(sequence).where(sequence > 0, -100)}
    if not isinstance(model, FlamingoForConditionalGeneration):
        return {"input_ids": ids.view(sequence.shape), **batch}
    if together > 1:
        batch["sequence_ids"] = sequence
    images = min(shape.images, shape.tokens)
    ids[:rows, torch.arange(images) * (shape.tokens // max(1, images))] = model.config.image_token_id
    ids = ids.view(sequence.shape)
    size = model.config.vision.image_size
    pixels = torch.empty(rows * images, shape.frames, 3, size, size, dtype=torch.uint8, device="meta")
    shown = ids == model.config.image_token_id
    phi = shown.cumsum(1) * (sequence > 0)
    return {**batch, "input_ids": ids, "pixel_values": pixels, "image_counts": shown.sum(1), "phi": phi}


def memory_of(config: TrainConfig, datasets: list[Rows], processes: int) -> Memory:
    """What a process of the run needs at the highest moment of an update.

    Raises:
        UserError: hybrid sharding over machines of unknown size, and what `meta_model` refuses.
    """
    run = config.run
    if run.parallel == "hybrid" and not run.sharding.size and "LOCAL_WORLD_SIZE" not in os.environ:
        raise UserError("a plan of run.parallel=hybrid needs run.sharding.size, the processes that share one copy")
    model, objective = meta_model(config, processes)
    if run.activation_checkpointing:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    batches = []
    for shape in datasets:
        one = batch_of(model, max(1, shape.rows // (processes * run.micro_batches)), shape)
        batches += [one] * min(run.micro_batches, 2)  # a third changes nothing
    device = "cuda" if run.device == "cuda" or config.plan_for.gib else "cpu"
    strategy = strategy_of(run, processes)
    return plan_step(model, objective, batches, strategy=strategy, processes=processes, device=device)


def plan(config: TrainConfig, datasets: list[Rows], processes: int) -> str:
    """The plan of a run in a few lines.

    Raises:
        UserError: it does not fit the device; says what to change.
    """
    memory = memory_of(config, datasets, processes)
    text = _describe(memory, processes)
    if not (limit := config.plan_for.gib or _own_gpu(config)):
        return f"{text}\nno limit is known: plan_for.gib=80 compares with a device of 80 GiB"
    room = (limit - RESERVED_GIB) * (1 - LOST)
    need = memory.device / GIB
    if need > room:
        raise UserError(
            f"the run does not fit: a process needs {need:.1f} GiB, and of a device of {limit:g} GiB tensors get "
            f"{room:.1f} ({_largest(memory)}): try {', or '.join(remedies(config, memory)) or 'a smaller model'}"
        )
    return f"{text}\nfits a device of {limit:g} GiB, of which tensors get {room:.1f}: {room - need:.1f} GiB are left"


def remedies(config: TrainConfig, memory: Memory) -> list[str]:
    """What would lower the largest parts, largest first."""
    run, sharding = config.run, config.run.sharding
    frozen = [part for part, value in asdict(config.model.freeze).items() if value == "frozen"]
    offers: dict[str, list[tuple[bool, str]]] = {
        "activations": [
            (not run.activation_checkpointing, "run.activation_checkpointing=true"),
            (True, f"run.micro_batches={2 * run.micro_batches} (or smaller batches)"),
        ],
        "weights": [
            (run.precision == "fp32", "run.precision=bf16"),
            (sharding.frozen == "replicate", "run.sharding.frozen=shard"),
            (sharding.frozen == "shard" and bool(frozen), "more processes"),
            (not sharding.cpu_offload, "run.sharding.cpu_offload=true"),
        ],
        "gradients": [
            (run.micro_batches > 1 and not sharding.sync_every_micro_batch, "run.sharding.sync_every_micro_batch=true"),
            (config.model.freeze.language == "train", "model.freeze.language=lora"),
        ],
        "optimizer": [
            (run.parallel == "hybrid", "run.parallel=fsdp"),
            (config.model.freeze.language == "train", "model.freeze.language=lora"),
            (True, "more processes"),
        ],
        "gathered": [(sharding.keep_gathered, "run.sharding.keep_gathered=false")],
    }
    chosen: list[str] = []
    for part in sorted(PARTS, key=lambda part: -memory.parts[part]):
        chosen += [text for applies, text in offers[part] if applies and text not in chosen]
    return chosen[:3]


def _describe(memory: Memory, processes: int) -> str:
    lines = [f"memory of a process of {processes} at the highest moment of an update, in GiB:"]
    lines += [f"  {part:<12} {size / GIB:10.3f}" for part, size in memory.parts.items()]
    lines.append(f"  {'on the device':<12} {memory.device / GIB:9.3f}")
    if memory.offloaded:
        lines.append(f"  {'on the CPU':<12} {memory.offloaded / GIB:10.3f}")
    sent = [
        f"{number} {kind}s of {memory.traffic.bytes[kind] / GIB:.3f} GiB"
        for kind, number in memory.traffic.calls.items()
    ]
    lines.append(
        f"between processes: {', '.join(sent) or 'nothing'} (two micro-batches of a dataset at most are counted)"
    )
    return "\n".join(lines)


def _largest(memory: Memory) -> str:
    parts = sorted(memory.parts.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{part} {size / GIB:.1f}" for part, size in parts)


def _own_gpu(config: TrainConfig) -> float:
    if config.run.device == "cpu" or not torch.cuda.is_available():
        return 0.0
    return torch.cuda.get_device_properties(0).total_memory / GIB


def rows_of(spec: Any) -> Rows:
    """What a dataset's description says about its largest batch."""
    images = 0 if spec.kind == "text" else spec.max_images
    together = spec.pack // spec.max_tokens if spec.pack else 1
    return Rows(spec.batch_size, spec.max_tokens, images, spec.max_frames, together)
