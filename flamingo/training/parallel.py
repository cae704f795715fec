"""Processes, devices and the FSDP2 plan.

Frozen and trained parameters never share a unit: a unit is gathered, cast and reduced as one, so a mixed one would
gather gradients for weights that have none. Units go bottom up, each with its own `fully_shard` (FSDP2). On gloo the
gradient division stays FSDP2's average (its pre-multiplied sum is not supported there), so a loss that is normalised by
the global number of labels is multiplied by the number of processes before its backward: see `Processes.size`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from flamingo.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the terminal."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all processes, in float64 (exact for counts)."""
        if self.size == 1:
            return values
        on = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(on)
        return [float(value) for value in on.tolist()]

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.size > 1:
            dist.barrier()


def start_processes(device: str, *, need_group: bool, timeout_minutes: float = 10.0) -> Processes:
    """Joins the process group that torchrun describes, or stands alone.

    Args:
        device: `auto`, `cpu` or `cuda`.
        need_group: also make a group of one process (FSDP2 on a single process).
        timeout_minutes: how long a collective may wait before all processes stop with an error.

    Raises:
        UserError: cuda was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device=cuda, but torch sees no GPU here: set run.device=cpu or install a CUDA build")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    where = torch.device("cpu")
    if kind == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(where)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    limit = timedelta(minutes=timeout_minutes)
    if size > 1:
        dist.init_process_group(backend, timeout=limit)
    elif need_group:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    return Processes(rank, size, where)


def set_threads(threads: int, size: int) -> None:
    """CPU threads of this process: as asked, else the machine's cores shared by its processes."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local))


def stop_processes() -> None:
    """Leaves the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Ends this process; one of several ends without tearing its interpreter down.

    Gloo's threads let go of a collective's tensors a moment after the collective is over. One that asks for the
    interpreter's lock while the interpreter shuts down aborts the process, and torchrun then reports a finished run as
    failed (pytorch pull request 179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(status)
    sys.exit(status)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def shard(model: nn.Module, units: Iterator[nn.Module], processes: Processes, precision: str) -> None:
    """Shards `model` over all processes, one FSDP2 unit for each of `units` (children before parents) and the root.

    Frozen units are gathered again in backward only where a gradient passes through them; the encoder runs under
    `no_grad`, so it is not. Weights that train stay fp32 and are cast for computing when `precision` is `bf16`.
    """
    mesh = init_device_mesh(processes.device.type, (processes.size,))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in units:
        if any(True for _ in unit.parameters()):
            # Gathering a frozen layer again costs less memory than keeping it; what trains is small and used at once.
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=not _trains(unit))
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def whole(value: Tensor) -> Tensor:
    """The full tensor behind a DTensor, or the tensor itself."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value
