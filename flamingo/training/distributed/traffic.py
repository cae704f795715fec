"""Count the collectives that torch hands to its backend, and their bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce"}


@dataclass
class Traffic:
    """Collectives and their bytes, by kind."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def see(self, func: Any, args: tuple[Any, ...]) -> None:
        """Count one call to torch's backend, if it is a collective."""
        if func.namespace != "c10d":
            return
        name = str(func._schema.name).removeprefix("c10d::")
        for part, kind in KINDS.items():
            if part in name:
                self.calls[kind] += 1
                tensors = [tensor for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
                self.bytes[kind] += max(tensor.numel() * tensor.element_size() for tensor in tensors)


class CountTraffic(TorchDispatchMode):
    """A dispatch mode that counts what is sent while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it becomes collectives on plain tensors first
        self.traffic.see(func, args)
        return func(*args, **(kwargs or {}))
