"""`plan=true`: a run's config to the memory of its processes, in words; refuses what cannot fit."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from torch import nn
from transformers import AutoConfig

from flamingo.backbones import OPEN_CLIP_CONFIG, read_open_clip_config
from flamingo.errors import UserError
from flamingo.hub import from_hub
from flamingo.training.config import TrainConfig
from flamingo.training.distributed.fsdp import sharding_strategy
from flamingo.training.memory_plan.dry_run import PARTS, Memory, plan_step
from flamingo.training.model_config import ModelConfig
from flamingo.training.objectives.protocol import BatchShape, Objective, objective_module
from flamingo.vision.resize import TIMM, timm_arch

GIB = 2**30
RESERVED_GIB, LOST = 1.5, 0.05
"""Memory of a GPU that no tensor gets (context, NCCL, kernels), and the share of the rest lost to fragmentation."""


def complete(model: ModelConfig) -> ModelConfig:
    """Return the config with the shapes of its backbones, read from the configs beside their weights if YAML has none.

    Raises:
        UserError: a shape is unknown without the weights.
    """
    vision, language = model.vision, model.language
    if vision.config is None and vision.name is not None:
        described = Path(vision.name) / OPEN_CLIP_CONFIG
        if described.is_file():
            vision = replace(vision, config=read_open_clip_config(described)[0])
        elif (name := str(vision.name)).startswith(TIMM) and timm.is_model(name.removeprefix(TIMM)):
            native: Any = timm.get_pretrained_cfg(name.removeprefix(TIMM))
            vision = replace(vision, config=timm_arch(name, int(native.input_size[-1])))
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
    """Return what the run would train, without memory, and its objective as the first of `processes` has it.

    Raises:
        UserError: a shape is missing, or what the objective needs to know it.
    """
    return objective_module(config.objective).build_on_meta(complete(config.model), processes)


def memory_of(config: TrainConfig, datasets: list[BatchShape], processes: int) -> Memory:
    """Return what a process of the run needs at the peak of an update.

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
        largest = objective.largest_batch(model, max(1, shape.rows // (processes * run.micro_batches)), shape)
        batches += [largest] * min(run.micro_batches, 2)  # a third changes nothing
    device = "cuda" if run.device == "cuda" or config.plan_for.gib else "cpu"
    strategy = sharding_strategy(run, processes)
    where: dict[str, Any] = {"strategy": strategy, "processes": processes, "device": device}
    return plan_step(model, objective, batches, **where, state=config.optim.state)


def plan(config: TrainConfig, datasets: list[BatchShape], processes: int) -> str:
    """Return the plan of a run in a few lines.

    Raises:
        UserError: it does not fit the device; says what to change.
    """
    memory = memory_of(config, datasets, processes)
    text = _describe(memory, processes)
    if not (limit := config.plan_for.gib or _own_gpu(config)):
        return f"{text}\nthe device's memory is unknown: plan_for.gib=80 compares with a device of 80 GiB"
    room = (limit - RESERVED_GIB) * (1 - LOST)
    need = memory.device / GIB
    if need > room:
        advice = ", or ".join(remedies(config, memory)) or "a smaller model"
        raise UserError(
            f"the run does not fit: a process needs {need:.1f} GiB ({_largest(memory)}), but tensors can use "
            f"{room:.1f} GiB of a device of {limit:g} GiB: try {advice}"
        )
    return (
        f"{text}\nfits a device of {limit:g} GiB, of which tensors can use {room:.1f}: {room - need:.1f} GiB are left"
    )


def remedies(config: TrainConfig, memory: Memory) -> list[str]:
    """Return settings that would shrink the largest parts, largest first; three at most."""
    run, sharding = config.run, config.run.sharding
    frozen = [part for part, value in asdict(config.model.freeze).items() if value == "frozen"]
    # Part to its remedies: whether each applies to this run, and what to set.
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
            (config.optim.state == "fp32", "optim.state=bf16"),
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
    lines = [f"memory of each of {processes} process(es) at the peak of an update, in GiB:"]
    lines += [f"  {part:<12} {size / GIB:10.3f}" for part, size in memory.parts.items()]
    lines.append(f"  {'on the device':<12} {memory.device / GIB:9.3f}")
    if memory.offloaded:
        lines.append(f"  {'on the CPU':<12} {memory.offloaded / GIB:10.3f}")
    sent = [
        f"{count} {kind}s of {memory.traffic.bytes[kind] / GIB:.3f} GiB" for kind, count in memory.traffic.calls.items()
    ]
    lines.append(
        f"between processes: {', '.join(sent) or 'nothing'} (at most two micro-batches of a dataset are counted)"
    )
    return "\n".join(lines)


def _largest(memory: Memory) -> str:
    parts = sorted(memory.parts.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{part} {size / GIB:.1f}" for part, size in parts)


def _own_gpu(config: TrainConfig) -> float:
    if config.run.device == "cpu" or not torch.cuda.is_available():
        return 0.0
    return torch.cuda.get_device_properties(0).total_memory / GIB


def process_count(config: TrainConfig) -> int:
    """Return how many processes train, or would in the plan."""
    return (config.plan_for.processes if config.plan else 0) or int(os.environ.get("WORLD_SIZE", "1"))


def largest_batch_of(spec: Any) -> BatchShape:
    """Return the shape of a dataset's largest batch."""
    images = 0 if spec.kind == "text" else spec.max_images
    together = spec.pack // spec.max_tokens if spec.pack else 1
    return BatchShape(spec.batch_size, spec.max_tokens, images, spec.max_frames, together)
