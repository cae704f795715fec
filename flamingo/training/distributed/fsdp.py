"""Processes, devices and how the weights lie on them (FSDP2).

Frozen and trained parameters never share a unit: a unit is gathered, cast and reduced as one, so a mixed one would
gather gradients for weights that have none. Units go bottom up, each with its own `fully_shard` (FSDP2). On gloo the
gradient division stays FSDP2's average (its pre-multiplied sum is not supported there), so a loss that is normalised by
the global number of labels is multiplied by the number of processes before its backward: see `Processes.size`.

Frozen weights have neither gradients nor optimizer state, so they are 2 bytes a weight in bf16 where trained ones are
16. Where they fit on every device they need not be sharded at all (`frozen="replicate"`), and nothing of them travels.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from flamingo.errors import UserError
from flamingo.training.config import RunConfig


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device
    limit_seconds: float = 600.0
    """How long one process may keep the others waiting; a collective gives up a little later."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the terminal."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Return the element-wise sum over all processes, in float64 (exact for counts)."""
        if self.size == 1:
            return values
        on = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(on)
        return [float(value) for value in on.tolist()]

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def wait_long(self) -> None:
        """Wait until all processes have come here, however long one works alone; they are asked whether they live.

        A collective would give up after `limit_seconds`; this counts in the store that brought the processes together.

        Raises:
            UserError: a process has given no sign of life for `SILENCE_SECONDS`.
        """
        if self.size == 1:
            return
        shared = _get_default_store()
        key, alive = f"flamingo/arrived/{next(_MEETINGS)}", [alive_key(rank) for rank in range(self.size)]
        shared.add(key, 1)
        seen: list[bytes] = []
        asked = changed = time.monotonic()
        while shared.add(key, 0) < self.size:
            time.sleep(0.05)
            if time.monotonic() - asked > SILENCE_SECONDS / 10 and shared.check(alive):
                asked, before, seen = time.monotonic(), seen, shared.multi_get(alive)
                silent = [rank for rank, (old, new) in enumerate(zip(before, seen, strict=False)) if old == new]
                if not silent:
                    changed = asked
                elif asked - changed > SILENCE_SECONDS:
                    raise UserError(
                        f"process {silent[0]} has given no sign of life for {SILENCE_SECONDS:.0f} s while the others "
                        "waited for it: look at its machine and start again, the run resumes from its last checkpoint"
                    )
        self.wait()  # or the process that keeps the store may be gone before another has seen that all are here


LAST_WORD_SECONDS = 30.0
"""Between the time that a slow process is given and the end of the others' patience: it may say why."""
SILENCE_SECONDS = 600.0
_MEETINGS = itertools.count()
"""Numbers the calls of `wait_long`, which every process makes in the same order."""


def alive_key(rank: int) -> str:
    """Return where in the store a process leaves a number that grows while it lives."""
    return f"flamingo/alive/{rank}"


def start_processes(
    device: str, *, need_group: bool, storage_minutes: float = 0.0, timeout_minutes: float = 10.0
) -> Processes:
    """Join the process group that torchrun describes, or run alone.

    Args:
        device: `auto`, `cpu` or `cuda`.
        need_group: also make a group of one process (FSDP2 on a single process).
        storage_minutes: how long a process waits for storage that is away, while the others wait for it.
        timeout_minutes: how much longer one process may keep the others waiting before all stop with an error.

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
    # A process that knows why it is slow says so first.
    minutes = timeout_minutes + storage_minutes
    limit = timedelta(minutes=minutes, seconds=LAST_WORD_SECONDS)
    if size > 1:
        dist.init_process_group(backend, timeout=limit)
    elif need_group:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    return Processes(rank, size, where, 60.0 * minutes)


def set_threads(threads: int, size: int) -> None:
    """Set the CPU threads of this process: as asked, else OMP_NUM_THREADS, else its share of the cores it may use."""
    torch.set_num_threads(threads or _told_threads() or _own_cores(int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))))


def _told_threads() -> int:
    """Return OMP_NUM_THREADS, 0 where it says nothing: torchrun sets it to 1 for several processes, whoever asks."""
    told = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    by_torchrun = told == "1" and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_WORLD_SIZE") != "1"
    return int(told) if told.isdecimal() and not by_torchrun else 0


def _own_cores(local: int) -> int:
    """Return the cores of one of the `local` processes of this machine."""
    every = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else every
    # srun binds each of its tasks to cores of their own; whoever else starts processes gives all of them the same.
    bound = "SLURM_STEP_NUM_TASKS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return max(1, min(allowed, every // local) if bound else allowed // local)


def stop_processes() -> None:
    """Leave the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_process(status: int, *, processes: int | None = None) -> NoReturn:
    """End this process; one of several ends without tearing its interpreter down.

    Gloo's threads let go of a collective's tensors a moment after the collective is over. One that asks for the
    interpreter's lock while the interpreter shuts down aborts the process, and torchrun then reports a finished run as
    failed (pytorch pull request 179291). `processes` is how many there are; by default what torchrun says.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if (processes or int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        os._exit(status)
    sys.exit(status)


def spawn(work: Callable[..., None], size: int, *arguments: Any) -> None:
    """Call `work(processes, *arguments)` in `size` new gloo processes of this machine; `work` must be picklable.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the first that failed.
    """
    with TemporaryDirectory() as folder:
        given = (size, str(Path(folder, "store")), work, arguments)
        # Forks of a server without threads; where it was told what to import (tests/conftest.py), they begin at once.
        mp.start_processes(_work, args=given, nprocs=size, start_method="forkserver")


def _work(rank: int, size: int, store: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    limit = timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
    work(Processes(rank, size, torch.device("cpu")), *arguments)
    dist.barrier()
    stop_processes()
    exit_process(0, processes=size)


@dataclass(frozen=True)
class ShardingStrategy:
    """How the weights lie on the processes, and in which precision: `flamingo.training.config.Sharding`, resolved."""

    precision: str = "fp32"
    """`bf16`: compute in bf16; what trains stays fp32 and is cast to be gathered, gradients are summed in fp32."""
    frozen: str = "shard"
    frozen_dtype: torch.dtype = torch.float32
    """How frozen weights are stored; bf16 needs precision bf16."""
    shard_size: int = 0
    """Processes that one copy is sharded over, next to each other by rank, the copies being kept equal by all-reduce
    (hybrid sharding); 0: all."""
    offload: bool = False
    """Sharded weights, gradients and optimizer state live in the CPU's memory and visit the device unit by unit."""
    keep_gathered: bool = False
    sync_every_micro_batch: bool = False


@dataclass(frozen=True)
class FsdpUnit:
    """Modules whose weights are gathered together, and reduced together where they train."""

    modules: list[nn.Module]
    keep: bool = False
    """It stays gathered between forward and backward: it is small, or needed again at once."""
    backward: bool = True
    """Whether the backward pass reads its weights. Where not, it is not gathered for it."""


def sharding_strategy(run: RunConfig, processes: int) -> ShardingStrategy | None:
    """Return how a run's config lays out its weights; None: whole, on one process.

    Hybrid sharding keeps a copy on each machine unless `run.sharding.size` says otherwise.
    """
    is_plain = processes == 1 and run.precision == "fp32" and not run.sharding.cpu_offload
    if run.parallel == "none" or (run.parallel == "auto" and is_plain):
        return None
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    stored = run.sharding.frozen_dtype(run.precision)
    # One process has nobody to share frozen weights with: gathering them would copy them in every forward and backward.
    as_computed = (stored is torch.bfloat16) == (run.precision == "bf16")
    alone = processes == 1 and as_computed and not run.sharding.cpu_offload
    return ShardingStrategy(
        precision=run.precision,
        frozen="replicate" if alone else run.sharding.frozen,
        frozen_dtype=stored,
        shard_size=(run.sharding.size or per_machine) if run.parallel == "hybrid" else 0,
        offload=run.sharding.cpu_offload,
        keep_gathered=run.sharding.keep_gathered,
        sync_every_micro_batch=run.sharding.sync_every_micro_batch,
    )


def device_mesh(processes: Processes, shard_size: int) -> DeviceMesh:
    """Return a mesh of one dimension over all processes, or two: copies, and the processes that share one."""
    size = shard_size or processes.size
    if size == processes.size:
        return init_device_mesh(processes.device.type, (size,))
    shape = (processes.size // size, size)
    return init_device_mesh(processes.device.type, shape, mesh_dim_names=("replicate", "shard"))


def set_weight_dtypes(model: nn.Module, frozen: torch.dtype) -> None:
    """Store what trains in fp32 and what is frozen as `frozen`, in place; buffers (rotary angles) stay as they are.

    So does the frozen weight of a batch norm: no kernel takes it in bf16 beside running statistics in fp32.
    """
    norms = {parameter for norm in batch_norms(model) for parameter in norm.parameters()}
    for parameter in model.parameters():
        wanted = torch.float32 if parameter.requires_grad or parameter in norms else frozen
        if parameter.is_floating_point() and parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Return the modules with running statistics, which torch keeps in fp32 whatever their input is."""
    return [module for module in model.modules() if getattr(module, "running_mean", None) is not None]


def shard(model: nn.Module, units: Iterable[FsdpUnit], processes: Processes, strategy: ShardingStrategy) -> None:
    """Shard `model` over the processes, one FSDP2 unit for each of `units` (children before parents) and the root.

    The model may still be on the CPU: each unit goes to the device when its turn comes, so that no device ever holds
    the whole model. Frozen units are gathered again in backward only where a gradient passes through them.
    """
    set_weight_dtypes(model, strategy.frozen_dtype)
    ignored = {p for p in model.parameters() if not p.requires_grad} if strategy.frozen == "replicate" else set()
    policy = MixedPrecisionPolicy()
    if strategy.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": device_mesh(processes, strategy.shard_size),
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy(pin_memory=processes.device.type == "cuda")
        if strategy.offload
        else OffloadPolicy(),
    }
    norms = batch_norms(model) if strategy.precision == "bf16" else []
    ignored |= {parameter for norm in norms for parameter in norm.parameters() if not parameter.requires_grad}
    # FSDP2 gathers, casts and reduces a unit as one, so frozen and trained weights must not share a unit.
    options["ignored_params"] = ignored
    for norm in norms:
        if any(parameter.requires_grad for parameter in norm.parameters()):
            whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
            fully_shard(norm, **options | {"mp_policy": whole})
    placed = ignored | {parameter for norm in norms for parameter in norm.parameters()}
    for unit in units:
        own = {p for module in unit.modules for p in module.parameters()} - placed
        if not own:
            continue
        if len({p.requires_grad for p in own}) == 2:
            raise ValueError(f"an FSDP unit of {type(unit.modules[0]).__name__} mixes frozen and trained weights")
        placed |= own
        keep = unit.keep or strategy.keep_gathered
        modules: Any = unit.modules if len(unit.modules) > 1 else unit.modules[0]
        fully_shard(modules, reshard_after_forward=not keep, **options)
        placed |= {p for module in unit.modules for p in module.parameters()}  # sharded ones are new objects
        head: Any = unit.modules[0]
        if not unit.backward:
            head.set_unshard_in_backward(False)
    fully_shard(model, reshard_after_forward=False, **options)
    # Ignored weights are not FSDP2's to move.
    for tensor in ignored:
        tensor.data = tensor.data.to(processes.device)
    if ignored:
        for buffer in model.buffers():
            buffer.data = buffer.data.to(processes.device)


def prepare_backward(model: nn.Module, strategy: ShardingStrategy, *, last: bool) -> None:
    """Tell a sharded model whether this is the last backward before the update: gradients are reduced with that one."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last or strategy.sync_every_micro_batch)
    model.set_is_last_backward(last)
    if strategy.keep_gathered:
        model.set_reshard_after_backward(last)


def full_tensor(value: Tensor) -> Tensor:
    """Return the full tensor behind a DTensor, or the tensor itself."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def local_tensor(value: Tensor) -> Tensor:
    """Return this process's part of a DTensor, or the tensor itself."""
    from torch.distributed.tensor import DTensor

    return value.to_local() if isinstance(value, DTensor) else value


def compile_layers(layers: Iterable[nn.Module], *, backend: str = "inductor") -> None:
    """Compile the layers in place; parameters keep their names. The first updates of each shape take longer."""
    layer: Any
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend)
