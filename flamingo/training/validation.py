"""The loss of each dataset on documents held out, in the middle of training and without a trace in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from flamingo.training.distributed.fsdp import Processes
from flamingo.training.objectives.losses import Objective


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; afterwards the model trains, its weights sharded again."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # without a backward nothing else lets go of what was gathered


def validation_losses(
    model: nn.Module,
    objective: Objective,
    steps: Iterable[Mapping[str, Sequence[Mapping[str, Tensor]]]],
    processes: Processes,
) -> dict[str, float]:
    """Mean loss of each dataset over all its labels on all processes, as `validation/<dataset>`.

    Args:
        model: on its device.
        objective: as in training.
        steps: for each step and dataset the batches of this process; the same number on every process.
        processes: of the run.
    """
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    with evaluating(model):
        for step in steps:
            for name, batches in step.items():
                for batch in batches:
                    tensors: dict[str, Any] = {key: value.to(processes.device) for key, value in batch.items()}
                    sums[name] = sums.get(name, 0.0) + float(objective.loss_sum(model, tensors))
                    counts[name] = counts.get(name, 0.0) + float(objective.count(batch))
    totals = processes.sum([*sums.values(), *counts.values()])
    half = len(totals) // 2
    return {f"validation/{name}": totals[i] / max(1.0, totals[half + i]) for i, name in enumerate(sums)}
