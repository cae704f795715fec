"""AdamW groups and the learning-rate schedule.

Weight decay touches matrices only. Norms, biases, gates, latents and the rows of new tokens are left alone: decaying a
gate towards zero would close it, and open_flamingo did exactly that to everything named after the gated blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from flamingo.training.config import OptimConfig

PartOf = Callable[[str], str]
"""Parameter name -> part of the model (`vision`, `language`, `resampler`, `cross_attention`, `new_tokens`)."""


def takes_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: a matrix that is no table of embeddings, latents or positions."""
    leaf = name.rsplit(".", 1)[-1]
    tables = ("latents", "embedding", "embeddings", "positional_embedding", "class_embedding")
    is_table = any(piece in tables or piece.startswith("new_token") for piece in name.split("."))
    return parameter.ndim >= 2 and not is_table and "gate" not in leaf


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    lr_factors: Mapping[str, float],
    part_of: PartOf,
    decay_factors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups for AdamW, one for each pair of learning rate and decay, in a stable order.

    Args:
        named: the trained parameters with their names; frozen ones are skipped.
        lr: base learning rate of an update.
        weight_decay: decoupled decay of matrices.
        lr_factors: part of the model, or `gates`, to a factor on `lr`.
        part_of: see `PartOf`.
        decay_factors: part of the model to a factor on `weight_decay`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        is_gate = name.rsplit(".", 1)[-1].endswith("gate")
        factor = lr_factors.get("gates", 1.0) if is_gate else lr_factors.get(part_of(name), 1.0)
        decay = weight_decay * (decay_factors or {}).get(part_of(name), 1.0) if takes_decay(name, parameter) else 0.0
        groups.setdefault((lr * factor, decay), []).append(parameter)
    return [
        {"params": members, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), members in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def adamw(groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """AdamW of these groups as one kernel: the same values as the plain one to rounding, several times faster."""
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


def optimizer_of(model: nn.Module, options: OptimConfig, part_of: PartOf) -> torch.optim.AdamW:
    """The optimizer of everything in `model` that trains, as a run's config describes it."""
    groups = parameter_groups(
        model.named_parameters(),
        lr=options.lr,
        weight_decay=options.weight_decay,
        lr_factors=asdict(options.lr_factors),
        part_of=part_of,
        decay_factors=asdict(options.weight_decay_factors),
    )
    return adamw(groups, betas=(options.beta1, options.beta2), eps=options.eps)


def lr_scale(step: int, *, steps: int, warmup_steps: int, schedule: str, final_ratio: float) -> float:
    """Factor on the learning rate of update `step` (0-based): linear warm-up, then constant or cosine.

    >>> [round(lr_scale(s, steps=10, warmup_steps=2, schedule="constant", final_ratio=0), 2) for s in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 1.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return final_ratio + (1.0 - final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def scheduled(step: int, steps: int, options: OptimConfig) -> float:
    """`lr_scale` of update `step` of `steps` with a run's options."""
    return lr_scale(
        step,
        steps=steps,
        warmup_steps=options.warmup_steps,
        schedule=options.schedule,
        final_ratio=options.final_lr_ratio,
    )


def set_lr(optimizer: torch.optim.Optimizer, scale: float) -> float:
    """Sets every group's rate to `initial_lr * scale`; returns the highest."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * scale
    return max(float(group["lr"]) for group in optimizer.param_groups)
