"""What an objective provides; `train.py`, sharding, compiling, checkpoints and memory plan use nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from flamingo.layers.attention import training_kernel
from flamingo.processor import FlamingoProcessor
from flamingo.training.config import RunConfig
from flamingo.training.distributed.fsdp import (
    FsdpUnit,
    Processes,
    ShardingStrategy,
    compile_layers,
    set_weight_dtypes,
    shard,
)
from flamingo.training.model_config import ModelConfig
from flamingo.training.objective_table import OBJECTIVES
from flamingo.transfer import sent

Term = tuple[str, str]
"""Names of a dataset and of a term of its loss."""
MicroBatches = Mapping[str, Sequence[Mapping[str, Tensor]]]
"""Dataset to this process's batches of it."""


@dataclass(frozen=True)
class BatchShape:
    """The largest batch of a dataset on all processes together."""

    rows: int
    tokens: int
    """Of a row, as `images` and `frames` are of a row and of an image."""
    images: int
    frames: int = 1
    together: int = 1
    """Rows of the longest length that share one where the dataset packs."""


@runtime_checkable
class Objective(Protocol):
    """A loss as a sum of named terms, and the parts of its model that are sharded and compiled.

    Each term is divided by its count over all processes and micro-batches, so it means the same for any number of them;
    terms are then added and each is logged under its name. An objective has the same terms for every batch. Counts come
    from the batch alone: the first backward of an update already needs the divisor of the whole update.
    """

    host_inputs: ClassVar[frozenset[str]]
    """Tensors of a batch that `sums` gets on the host, because their values decide shapes (`flamingo/transfer.py`)."""

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, int]:
        """Return what each term of this batch is divided by, as this micro-batch's share of it."""

    def sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum of each term as a differentiable scalar, under the names that `counts` uses."""

    def fsdp_units(self, model: nn.Module) -> Iterable[FsdpUnit]:
        """Return what is sharded as one, children before parents; the root takes the rest."""

    def compiled_layers(self, model: nn.Module) -> Iterable[nn.Module]:
        """Return the modules whose `forward` is compiled with `run.compile=true`."""

    def largest_batch(self, model: nn.Module, rows: int, shape: BatchShape) -> dict[str, Tensor]:
        """Return a batch of `rows` rows as long as they may be, for the memory plan.

        Integers are real and on the CPU; images are on the meta device.
        """


def on_device(objective: Objective, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a batch as `objective.sums` takes it, on its way to the device."""
    return {name: x if name in objective.host_inputs else sent(x, device) for name, x in batch.items()}


def sums_of(
    objective: Objective,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    device: torch.device,
    strategy: ShardingStrategy | None,
) -> dict[str, Tensor]:
    """Return `objective.sums` of a batch that is still on the host, with the kernels that train fastest here."""
    in_bf16 = strategy is not None and strategy.precision == "bf16"
    inputs = on_device(objective, batch, device)
    with training_kernel(batch.get("labels"), device, in_bf16=in_bf16):
        return objective.sums(model, inputs)


def count_terms(objective: Objective, micro_batches: MicroBatches) -> dict[Term, float]:
    """Return the count of each loss term of each dataset in the micro-batches of this process."""
    counts: dict[Term, float] = {}
    for name, batches in micro_batches.items():
        for batch in batches:
            for term, count in objective.counts(batch).items():
                counts[name, term] = counts.get((name, term), 0.0) + count
    return counts


def add_terms(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of terms; of a single one, itself."""
    return functools.reduce(torch.add, terms)


@dataclass(frozen=True)
class Setup:
    """An objective with its model, ready to train."""

    model: nn.Module
    objective: Objective
    part_of: Callable[[str], str]
    """Parameter name to part of the model, for learning rates and logged norms."""
    collate: Callable[[Any], Any]
    """Makes the `Collate` of this run, given the module `data.batches.collate`; `data` imports this package, hence the
    argument in place of an import."""
    export: Callable[[dict[str, Tensor], Path], Any]
    """Writes the full state dict into a folder."""
    processor: FlamingoProcessor | None = None
    frozen: dict[str, str] = field(default_factory=dict)
    """Frozen part to a fingerprint of its weights. A checkpoint lacks these weights, so it must say which they were."""


@runtime_checkable
class ObjectiveModule(Protocol):
    """The two functions of an objective's module."""

    @staticmethod
    def build(model: ModelConfig, run_dir: Path, processes: Processes, texts: Callable[[], Iterable[str]]) -> Setup:
        """Build the model and everything around it; `texts` gives the text of the training documents."""

    @staticmethod
    def build_on_meta(model: ModelConfig, processes: int) -> tuple[nn.Module, Objective]:
        """Build the model without memory, from shapes alone, and the objective of the first of `processes`."""


def parallelize(
    model: nn.Module, objective: Objective, run: RunConfig, processes: Processes, strategy: ShardingStrategy | None
) -> None:
    """Make the model ready to train, in place: recomputing, then compiled, then sharded. What trains is fp32."""
    if run.activation_checkpointing:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    if run.compile:
        compile_layers(objective.compiled_layers(model))
    if strategy is None:
        set_weight_dtypes(model.to(processes.device), torch.float32)
    else:
        shard(model, objective.fsdp_units(model), processes, strategy)


def objective_module(name: str) -> ObjectiveModule:
    """Import the module of an objective."""
    return cast("ObjectiveModule", import_module(OBJECTIVES[name]))
