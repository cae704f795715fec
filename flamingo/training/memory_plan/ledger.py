"""Bytes of live tensors while code runs, by what they are for.

The same ledger serves real tensors and those without memory (torch's fake tensors), because it looks at
storages and not at an allocator. It sees every tensor that an operator returns, and it sees FSDP2 give a storage up and
take it again (`resize_`); what a kernel allocates for itself while it runs, it does not see.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_STORAGE: Any = torch.UntypedStorage
_FRAMES = 12
"""How many frames up the stack FSDP2 is looked for."""


class Ledger(TorchDispatchMode):
    """Live bytes by label while it is active; `peak` is their highest sum and `at_peak` what it was made of.

    Labels are those given to `own` and `relabel`, `gathered` for what FSDP2 allocates, and `activations` for the rest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self._entries: dict[int, tuple[str, int]] = {}
        self._references: dict[int, Any] = {}
        self._resize = torch.UntypedStorage.resize_

    def own(self, tensors: Iterable[Tensor], label: str) -> None:
        """Take tensors that exist already into the ledger."""
        for tensor in tensors:
            self._add(local(tensor), label)
        self._note_peak()

    def relabel(self, tensors: Iterable[Tensor], label: str) -> None:
        """Change the label of tensors that the ledger has seen."""
        for tensor in tensors:
            key = local(tensor).untyped_storage()._cdata
            if key in self._entries:
                old, size = self._entries[key]
                self.live[old] -= size
                self.live[label] += size
                self._entries[key] = label, size

    def __enter__(self) -> Ledger:
        ledger, resize = self, self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            out = resize(storage, size)
            ledger._resized(storage)
            return out

        _STORAGE.resize_ = resize_
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _STORAGE.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its local tensors come next
        out = func(*args, **(kwargs or {}))
        self.see(out)
        return out

    def see(self, out: Any) -> None:
        """Take what an operator has returned into the ledger."""
        label = ""
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
                label = label or ("gathered" if _in_fsdp() else "activations")
                self._add(tensor, label)
        self._note_peak()

    def _add(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._entries:
            return
        self._entries[key] = label, size
        self.live[label] += size
        self._references[key] = weakref.ref(storage, partial(self._gone, key))

    def _gone(self, key: int, _: Any) -> None:
        self._references.pop(key, None)
        if entry := self._entries.pop(key, None):
            self.live[entry[0]] -= entry[1]

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._entries:
            label, size = self._entries[key]
            self.live[label] += storage.nbytes() - size
            self._entries[key] = label, storage.nbytes()
            self._note_peak()

    def _note_peak(self) -> None:
        total = sum(self.live.values())
        if total > self.peak:
            self.peak, self.at_peak = total, dict(self.live)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _in_fsdp() -> bool:
    frame: Any = sys._getframe(2)
    for _ in range(_FRAMES):
        if frame is None:
            return False
        if "/distributed/fsdp/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
