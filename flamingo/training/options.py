"""Tables of the config that `config.py` puts together: sharding, what trains and how fast, adapters, the plan.

Each brings the clauses that say what is impossible in it, so that a table and its limits are read in one place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

FROZEN_WEIGHTS = ("shard", "replicate")
FROZEN_PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(kw_only=True, slots=True)
class Sharding:
    """How FSDP2 lays the weights on the processes; changes speed and memory, and only `frozen_precision` the values."""

    size: int = 0
    """For `run.parallel=hybrid`: processes that share one copy, next to each other by rank; 0: those of a machine."""
    frozen: str = "shard"
    """`replicate`: every process holds all frozen weights, where they fit: nothing of them travels."""
    frozen_precision: str = "auto"
    """How frozen weights are stored; `auto`: as `run.precision`."""
    cpu_offload: bool = False
    """Sharded weights and optimizer state live in the CPU's memory: slow, for what does not fit otherwise."""
    keep_gathered: bool = False
    """Gathered weights stay so until the update: fewest collectives, most memory."""
    sync_every_piece: bool = False
    """Reduce gradients after every piece of a batch and not once an update: less memory, more traffic."""

    def problems(self, parallel: str, precision: str, world_size: int) -> Iterator[str]:
        """What cannot be with this `run.parallel`, `run.precision` and number of processes."""
        key = "run.sharding"
        for name, value, allowed in (
            ("frozen", self.frozen, FROZEN_WEIGHTS),
            ("frozen_precision", self.frozen_precision, FROZEN_PRECISIONS),
        ):
            if value not in allowed:
                yield f"{key}.{name}={value} is not one of {', '.join(allowed)}"
        if self.size < 0:
            yield f"{key}.size={self.size} is below its least value 0"
        elif self.size and parallel != "hybrid":
            yield f"{key}.size={self.size} is for run.parallel=hybrid, not {parallel}"
        elif self.size and world_size % self.size:
            yield f"{key}.size={self.size} does not divide the {world_size} processes: use a divisor of {world_size}"
        if self.frozen_precision == "bf16" and precision != "bf16":
            yield f"{key}.frozen_precision=bf16 needs run.precision=bf16: what computes in fp32 gathers fp32"
        if self.frozen == "replicate" and precision == "bf16" and self.frozen_precision == "fp32":
            yield f"{key}.frozen_precision=fp32 with {key}.frozen=replicate cannot compute in bf16: set it to auto"
        if parallel == "none":
            if world_size > 1:
                yield f"run.parallel=none with {world_size} processes would train {world_size} models: use auto"
            if precision == "bf16":
                yield "run.parallel=none cannot compute in bf16: use run.parallel=auto"
            for name, given in (("frozen=replicate", self.frozen == "replicate"), ("cpu_offload", self.cpu_offload)):
                if given:
                    yield f"{key}.{name} has no meaning with run.parallel=none: use run.parallel=fsdp"

    def frozen_dtype(self, precision: str) -> torch.dtype:
        """How frozen weights are stored in a run that computes in `precision`."""
        chosen = precision if self.frozen_precision == "auto" else self.frozen_precision
        return torch.bfloat16 if chosen == "bf16" else torch.float32


@dataclass(kw_only=True, slots=True)
class FreezePolicy:
    """`frozen` or `train` for each part, for the language model also `lora`; the defaults are the paper's.

    Objectives contrastive and language train their whole model; of this table they heed only `language: lora`.
    """

    vision: str = "frozen"
    language: str = "frozen"
    resampler: str = "train"
    cross_attention: str = "train"
    new_tokens: str = "train"


@dataclass(kw_only=True, slots=True)
class LoraOptions:
    """Low-rank adapters in the frozen LM (Hu et al. 2021), with `model.freeze.language=lora`."""

    rank: int = 16
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    targets: list[str] | None = None
    """Last names of the linear layers that get one, such as `q_proj`; none: all in the decoder layers."""

    def problems(self, objective: str, weights: str | None) -> Iterator[str]:
        """What cannot be; `objective` is empty where there are no adapters, `weights` the LM's name."""
        if objective == "contrastive":
            yield "model.freeze.language=lora is for objectives flamingo and language: set it to frozen"
        if objective == "language" and not weights:
            yield "model.freeze.language=lora adapts a language model that exists: give model.language.name"
        if self.rank < 1:
            yield f"model.lora.rank={self.rank} is below its least value 1"
        if not self.alpha > 0:
            yield f"model.lora.alpha={self.alpha} must be above 0"
        if self.targets is not None and not self.targets:
            yield "model.lora.targets is empty: name linear layers, or null for all of the decoder layers"


@dataclass(kw_only=True, slots=True)
class LrFactors:
    """Factor on `optim.lr` for each part."""

    vision: float = 1.0
    language: float = 1.0
    resampler: float = 1.0
    cross_attention: float = 1.0
    new_tokens: float = 1.0
    gates: float = 1.0
    """The gates of the blocks, instead of `cross_attention`."""


@dataclass(kw_only=True, slots=True)
class DecayFactors:
    """Factor on `optim.weight_decay` for each part."""

    vision: float = 1.0
    language: float = 1.0
    resampler: float = 1.0
    cross_attention: float = 1.0
    new_tokens: float = 1.0


@dataclass(kw_only=True, slots=True)
class PlanTarget:
    """What `plan=true` plans for."""

    processes: int = 0
    """0: those of this start."""
    gib: float = 0.0
    """Memory of a device in GiB; 0: what this machine's GPU has, and on a CPU no limit."""

    def problems(self) -> Iterator[str]:
        """What cannot be."""
        if self.processes < 0:
            yield f"plan_for.processes={self.processes} is below its least value 0"
        if self.gib < 0:
            yield f"plan_for.gib={self.gib} is below its least value 0"
