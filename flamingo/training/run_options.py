"""The parts of `run` that have fields of their own: checkpoints, evaluation during training, launching.

They are typed data like the rest of the config. None of them changes what an update computes, so a run may go on with
other values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

FREE_TABLES = ("run.checkpoint.", "run.watch.", "run.validation.", "run.probe.", "run.wandb", "nodes", "launch.")
"""Beginnings of keys that may differ between a run and its continuation."""


@dataclass(kw_only=True, slots=True)
class CheckpointOptions:
    """When resumable checkpoints are written beside every `run.checkpoint_every` updates, and which of them stay."""

    minutes: float = 0.0
    """Also when this many minutes have passed since the last one, by the first process's clock; 0: never."""
    keep_every: int = 0
    """Checkpoints of updates divisible by this stay for good, beside the newest `run.keep_last`; 0: none."""
    background: bool = True
    """Write while training goes on; only the copy to the CPU's memory holds it up."""
    grace_seconds: float = 120.0
    """After SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C: the update in work and its checkpoint must be done within this many
    seconds, or the process ends with what was saved before."""

    def problems(self) -> Iterator[str]:
        """Every impossible value."""
        for key, value in (("minutes", self.minutes), ("keep_every", self.keep_every)):
            if value < 0:
                yield f"run.checkpoint.{key}={value} is below its least value 0"
        if not self.grace_seconds > 0:
            yield f"run.checkpoint.grace_seconds={self.grace_seconds} must be above 0"


@dataclass(kw_only=True, slots=True)
class ValidationOptions:
    """The loss of each dataset on pages that are not trained on."""

    every: int = 0
    """Updates between two validations, the last update included; 0: never."""
    batches: int = 8
    """Batches of each dataset, always the same ones."""
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> fields of `data.loading.loader.DatasetSpec`, as in `data.datasets`."""

    def problems(self, world_size: int) -> Iterator[str]:
        """Every impossible value."""
        if self.every < 0:
            yield f"run.validation.every={self.every} is below its least value 0"
        if self.batches < 1:
            yield f"run.validation.batches={self.batches} is below its least value 1"
        if self.every and not self.datasets:
            yield "run.validation.every is set and run.validation.datasets is empty: name at least one dataset"
        for name, dataset in self.datasets.items():
            batch = dataset.get("batch_size")
            if isinstance(batch, int) and batch % world_size:
                yield f"run.validation.datasets.{name}.batch_size={batch} is not divisible by processes = {world_size}"


@dataclass(kw_only=True, slots=True)
class ProbeOptions:
    """Few-shot scores during training, by the evaluation's own tasks and loop; each process asks all of them."""

    every: int = 0
    """Updates between two probes, the last update included; 0: never."""
    tasks: list[str] = field(default_factory=list)
    """Names of tasks (the files of hydra/task)."""
    shots: list[int] = field(default_factory=lambda: [0, 4])
    queries: int = 64
    """Queries of each task."""
    batch_size: int = 16
    data: str = "runs/demo/data"
    """Root of the prepared data, which tasks refer to."""

    def problems(self, objective: str) -> Iterator[str]:
        """Every impossible value."""
        for key, value, least in (
            ("every", self.every, 0),
            ("queries", self.queries, 1),
            ("batch_size", self.batch_size, 1),
        ):
            if value < least:
                yield f"run.probe.{key}={value} is below its least value {least}"
        if not self.every:
            return
        if objective != "flamingo":
            yield f"run.probe.every is for objective flamingo, not {objective}: set it to 0"
        if not self.tasks:
            yield "run.probe.every is set and run.probe.tasks is empty: name at least one task"
        if not self.shots or min(self.shots) < 0:
            yield f"run.probe.shots={self.shots} must be numbers of 0 or more"


@dataclass(kw_only=True, slots=True)
class WatchOptions:
    """What is done about updates that are not finite and about a run that stands still."""

    max_nonfinite: int = 0
    """Updates in a row that are left out because a loss or the gradient is not finite; one more stops the run."""
    stall_minutes: float = 10.0
    """When no update ends for so long, every process prints where its threads are; 0: never."""

    def problems(self) -> Iterator[str]:
        """Every impossible value."""
        for key, value in (("max_nonfinite", self.max_nonfinite), ("stall_minutes", self.stall_minutes)):
            if value < 0:
                yield f"run.watch.{key}={value} is below its least value 0"


@dataclass(kw_only=True, slots=True)
class LaunchOptions:
    """What `launch=slurm` and `launch=local` ask the scheduler for."""

    processes: int = 8
    """Processes of a node, one a GPU."""
    gpus: int = 8
    """GPUs of a node; 0 on nodes without."""
    cpus: int = 12
    """CPU cores of a process: its own and those of its loader workers."""
    minutes: int = 1440
    """Time limit; the run is saved before it and queued again."""
    partition: str | None = None
    account: str | None = None

    def problems(self, nodes: int) -> Iterator[str]:
        """Every impossible value."""
        for key, value, least in (
            ("nodes", nodes, 1),
            ("launch.processes", self.processes, 1),
            ("launch.gpus", self.gpus, 0),
            ("launch.cpus", self.cpus, 1),
            ("launch.minutes", self.minutes, 1),
        ):
            if value < least:
                yield f"{key}={value} is below its least value {least}"
