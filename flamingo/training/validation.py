"""The loss of each dataset on held-out documents, measured during training without affecting it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from flamingo.training.distributed.fsdp import Processes
from flamingo.training.metrics.throughput import mean_terms
from flamingo.training.objectives.protocol import Objective, on_device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off inside; afterwards the model trains, its weights sharded again."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # without a backward nothing else frees what was gathered


def validation_losses(
    model: nn.Module,
    objective: Objective,
    steps: Iterable[Mapping[str, Sequence[Mapping[str, Tensor]]]],
    processes: Processes,
) -> dict[str, float]:
    """Return the mean loss of each dataset over its labels on all processes, as `mean_terms` names them.

    Args:
        model: on its device.
        objective: as in training.
        steps: for each step and dataset the batches of this process; the same number on every process.
        processes: of the run.
    """
    sums: dict[tuple[str, str], float] = {}
    counts: dict[tuple[str, str], float] = {}
    with evaluating(model):
        for step in steps:
            for name, batches in step.items():
                for batch in batches:
                    for term, total in objective.sums(model, on_device(objective, batch, processes.device)).items():
                        sums[name, term] = sums.get((name, term), 0.0) + float(total)
                    for term, count in objective.counts(batch).items():
                        counts[name, term] = counts.get((name, term), 0.0) + count
    totals = processes.sum([*sums.values(), *(counts[key] for key in sums)])
    divisors = {key: max(1.0, count) for key, count in zip(sums, totals[len(sums) :], strict=True)}
    return mean_terms("validation", dict(zip(sums, totals, strict=False)), divisors)
