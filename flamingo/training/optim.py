"""An update: AdamW's groups, the learning-rate schedule, and what happens when a gradient is not finite.

Weight decay touches matrices only. Norms, biases, gates, latents and the rows of new tokens are left alone: decaying a
gate towards zero would close it, and open_flamingo did exactly that to everything named after the gated blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flamingo.errors import UserError
from flamingo.training.config import OptimConfig
from flamingo.training.distributed.fsdp import Processes
from flamingo.training.optim_state import SmallStateAdamW, moments

PartOf = Callable[[str], str]
"""Parameter name -> part of the model (`vision`, `language`, `resampler`, `cross_attention`, `new_tokens`)."""


def takes_decay(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: to matrices, except embedding rows, latents and positions."""
    tables = ("latents", "embedding", "embeddings", "positional_embedding", "class_embedding")
    is_table = any(part in tables or part.startswith("new_token") for part in name.split("."))
    return parameter.ndim >= 2 and not is_table


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    lr_factors: Mapping[str, float],
    part_of: PartOf,
    decay_factors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Return groups for AdamW, one for each pair of learning rate and decay, in a stable order.

    Args:
        named: the trained parameters with their names; frozen ones are skipped.
        lr: base learning rate of an update.
        weight_decay: decoupled decay of matrices.
        lr_factors: part of the model, or `gates`, to a factor on `lr`.
        part_of: see `PartOf`.
        decay_factors: part of the model to a factor on `weight_decay`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    # A few groups, not one a parameter: AdamW launches kernels for each group.
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


def adamw(
    groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float, state: str = "fp32"
) -> torch.optim.Optimizer:
    """Return AdamW of these groups as one kernel: the plain one's values to rounding, several times faster.

    `state` says how its moments are kept: see `optim_state`.

    Every parameter has its state from the start. AdamW makes it with the first gradient, so a weight that never gets
    one (the last norm of an encoder whose tokens are taken before it) would be missing in checkpoints, which torch then
    cannot read.
    """
    if state != "fp32":
        return SmallStateAdamW(groups, betas=betas, eps=eps, state=state)
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter] = {"step": step, **moments(parameter, state)}
    return optimizer


def build_optimizer(model: nn.Module, options: OptimConfig, part_of: PartOf) -> torch.optim.Optimizer:
    """Return the optimizer of everything in `model` that trains, as a run's config describes it."""
    groups = parameter_groups(
        model.named_parameters(),
        lr=options.lr,
        weight_decay=options.weight_decay,
        lr_factors=asdict(options.lr_factors),
        part_of=part_of,
        decay_factors=asdict(options.weight_decay_factors),
    )
    return adamw(groups, betas=(options.beta1, options.beta2), eps=options.eps, state=options.state)


def lr_scale(step: int, *, steps: int, warmup_steps: int, schedule: str, final_ratio: float) -> float:
    """Return the factor on the learning rate of update `step` (0-based): linear warm-up, then constant or cosine.

    >>> [round(lr_scale(s, steps=10, warmup_steps=2, schedule="constant", final_ratio=0), 2) for s in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 1.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return final_ratio + (1.0 - final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def scheduled_scale(step: int, steps: int, options: OptimConfig) -> float:
    """Return `lr_scale` of update `step` (0-based) of `steps`, as a run's config describes the schedule."""
    return lr_scale(
        step,
        steps=steps,
        warmup_steps=options.warmup_steps,
        schedule=options.schedule,
        final_ratio=options.final_lr_ratio,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, options: OptimConfig) -> float:
    """Set the rate of every group for update `step` of `steps`; return the highest."""
    scale = scheduled_scale(step, steps, options)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * scale
    return max(float(group["lr"]) for group in optimizer.param_groups)


class NonfiniteUpdates:
    """A count of updates skipped because loss or gradient is not finite; too many in a row stop the run.

    All processes call it with the same facts, so that all of them do the same.
    """

    def __init__(self, run_dir: Path, processes: Processes, limit: int) -> None:
        """Stop the run when more than `limit` updates in a row are skipped."""
        self._run_dir, self._processes, self._limit = run_dir, processes, limit
        self.total = self.in_a_row = 0

    def skip(self, step: int, norm: float, losses: Mapping[str, float], keys: Mapping[str, list[list[str]]]) -> None:
        """Count an update that is skipped, and write down the samples of this process's batch.

        Args:
            step: updates before this one.
            norm: of the gradient.
            losses: sum of each loss term on this process.
            keys: of each dataset, the samples' keys by micro-batch.

        Raises:
            UserError: the limit is exceeded.
        """
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        path = self._run_dir / f"nonfinite-step-{step:08d}-rank-{self._processes.rank}.json"
        # As text: JSON has no nan.
        facts: dict[str, Any] = {"grad_norm": str(norm), "losses": {name: str(loss) for name, loss in losses.items()}}
        path.write_text(json.dumps({"step": step, **facts, **keys}))
        if self.in_a_row > self._limit:
            streak = f" ({self.in_a_row} updates in a row)" if self._limit else ""
            raise UserError(
                f"update {step}: the gradient is not finite, and no weight was changed{streak}; the keys of the batch "
                f"are in {path}: lower optim.lr, or look at these documents with python -m data inspect"
            )

    def end_streak(self) -> None:
        """Note that an update was made."""
        self.in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """Return the counts for a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the counts."""
        self.total, self.in_a_row = state.get("total", 0), state.get("in_a_row", 0)
