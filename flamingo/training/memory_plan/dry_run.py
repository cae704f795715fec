"""The memory that a process needs for a step, before anything is allocated: `python train.py ... plan=true`.

Nothing is modelled. The step that would run does run, forward and backward through the same sharding code and
the same model, on tensors that have a shape and no memory and with processes that exist in name only, while a ledger
adds up the storages that live (`ledger.py`). So whatever changes the step, another strategy, recomputation, another
LM, changes the plan. Only tensors of integers, who sees which image, are real: their values decide shapes.

What the plan leaves out is the context of the GPU, its allocator's fragmentation and what kernels allocate inside; the
check against a device's memory sets something aside for them (`plan.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flamingo.language import loss as chunked_loss
from flamingo.training.distributed.fsdp import Processes, ShardingStrategy, prepare_backward, shard
from flamingo.training.distributed.traffic import Traffic
from flamingo.training.memory_plan.ledger import Ledger, local
from flamingo.training.objectives.protocol import Objective, add_terms
from flamingo.training.optim_state import moments

PARTS = ("weights", "gradients", "optimizer", "gathered", "activations")


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of a step, by part, and the traffic of that step."""

    parts: dict[str, int]
    offloaded: int
    """Of these, bytes that lie in the CPU's memory."""
    traffic: Traffic

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values()) - self.offloaded


class _RealIntegers(TorchDispatchMode):
    """Inside FakeTensorMode: what works on integers alone is computed for real."""

    def __init__(self, ledger: Ledger, traffic: Traffic) -> None:
        super().__init__()
        self._ledger, self._traffic = ledger, traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if func.namespace == "c10d":
            self._traffic.see(func, args)
        elif _whole(func, tensors, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _whole(func: Any, tensors: Sequence[Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether an operator involves real integers only."""
    dtype = kwargs.get("dtype")
    if dtype is not None and (dtype.is_floating_point or dtype.is_complex):
        return False
    if tensors:
        return not any(t.is_floating_point() or isinstance(t, FakeTensor) or t.is_meta for t in tensors)
    # Without a dtype these take that of their values; all other factories of tensors make floats.
    values = args[:1] if func.overloadpacket is not torch.ops.aten.full else args[1:2]
    of_values = func.overloadpacket in (torch.ops.aten.arange, torch.ops.aten.full, torch.ops.aten.scalar_tensor)
    return dtype is not None or (of_values and all(isinstance(value, int) for value in values))


@contextmanager
def _pretended_group(size: int) -> Iterator[Processes]:
    """Pretend a process group of `size`, of which this process is the first and the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a plan is made before the processes join their group")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield Processes(0, size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@contextmanager
def _chunks_of(kind: str) -> Iterator[None]:
    """Let the loss take as many positions at a time as it does on this kind of device."""
    kept = chunked_loss.CHUNK_BYTES["cpu"]
    chunked_loss.CHUNK_BYTES["cpu"] = chunked_loss.CHUNK_BYTES[kind]
    try:
        yield
    finally:
        chunked_loss.CHUNK_BYTES["cpu"] = kept


def plan_step(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[dict[str, Tensor]],
    *,
    strategy: ShardingStrategy | None,
    processes: int = 1,
    device: str = "cpu",
    state: str = "fp32",
) -> Memory:
    """Return what the first process needs for one update from these micro-batches.

    Args:
        model: on the meta device; parts frozen, adapters put in and recomputation switched on as they will be.
        objective: what its loss is.
        batches: integer tensors are real; `pixel_values` may be on the meta device.
        strategy: how it is sharded; None: not at all.
        processes: that share the work.
        device: `cpu` or `cuda`, which decides the chunks of the loss.
        state: how the optimizer keeps its moments.
    """
    ledger, traffic = Ledger(), Traffic()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _pretended_group(processes) as group, _chunks_of(device), fake, _RealIntegers(ledger, traffic):
        model.to_empty(device="cpu")
        # Integers are real in a plan, so their buffers need values; zeros serve.
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_floating_point():
                    module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
        if strategy is not None:
            shard(model, objective.fsdp_units(model), group, strategy)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kept = [tensor for parameter in trained for tensor in moments(local(parameter), state).values()]
        subject: Any = model
        if getattr(model, "_head_is_last", False) is None:
            subject._head_is_last = True  # normally determined by comparing values, of which there are none
        model.train()
        with ledger:
            ledger.own((*model.parameters(), *model.buffers()), "weights")
            ledger.own(kept, "optimizer")
            for index, batch in enumerate(batches):
                if strategy is not None:
                    prepare_backward(model, strategy, last=index + 1 == len(batches))
                tensors = {name: value.to("cpu") if value.is_meta else value for name, value in batch.items()}
                loss = add_terms(objective.sums(model, tensors).values())
                loss.backward()
                ledger.relabel((p.grad for p in trained if p.grad is not None), "gradients")
                del loss, tensors
            ledger._note_peak()
    parts = {part: ledger.at_peak.get(part, 0) for part in PARTS}
    resting = sum(parts[part] for part in ("weights", "gradients", "optimizer"))
    return Memory(parts, resting if strategy is not None and strategy.offload else 0, traffic)
