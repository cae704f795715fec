"""Batches on their way from a worker to the trainer: written once, into memory that both have, and never copied.

The way torch has for it makes a new file in memory for every tensor of every batch: each document of it is cleared and
mapped anew, and every handle goes through a socket. Here are a few slabs, made before the workers are forked and used
again and again. A worker takes a free one, its collate writes the batch into it, and only the slab's number and the
places of the tensors go through the queue. When the last tensor of the batch is gone in the trainer the slab is free.

What is notable: nobody ever waits for a slab. A trainer that keeps its batches, or one that is larger than a slab, gets
tensors of torch's own kind. The memory is anonymous, so the size of /dev/shm (64 MB in a container) is no limit.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import weakref
from collections.abc import Sequence
from itertools import count
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.batches.batch import Batch
from data.loading.step_dataset import StepDataset

ALIGN = 64
MOST_BYTES = 1 << 31  # of a slab; documents that no batch has reached take no memory
SPARE = 1 << 14  # bytes for what lies between tensors
NUMBER = 2  # bytes of a slab's number
_numbers = count()
_known: weakref.WeakValueDictionary[int, Slabs] = weakref.WeakValueDictionary()

Layout = dict[str, tuple[int, tuple[int, ...], torch.dtype]]
"""Name of a tensor to its first byte in the slab, shape and type."""


class Slabs:
    """`count` slabs of `size` bytes, of the process that makes them and those that it forks from then on."""

    def __init__(self, count: int, size: int) -> None:
        self.memory = [mmap.mmap(-1, max(1, size)) for _ in range(count)]
        self.key = next(_numbers)
        self._owner = os.getpid()
        self._free, self._give = os.pipe()
        os.set_blocking(self._free, False)
        weakref.finalize(self, _close, self._free, self._give)
        for number in range(count):
            self.release(number)
        _known[self.key] = self

    def release(self, number: int) -> None:
        """This slab is free."""
        os.write(self._give, number.to_bytes(NUMBER, "little"))

    def take(self) -> Arena | None:
        """A free slab to write a batch into; None when there is none."""
        try:
            number = int.from_bytes(os.read(self._free, NUMBER), "little")
        except BlockingIOError:
            return None
        return Arena(self, number)

    def whole(self, number: int) -> Tensor:
        """The bytes of a slab. It is released when the last tensor that is made of this one is gone."""
        view = np.frombuffer(self.memory[number], dtype=np.uint8)
        weakref.finalize(view, self._gone, number).atexit = False
        return torch.from_numpy(view)

    def _gone(self, number: int) -> None:
        if os.getpid() == self._owner:  # and not a process that was forked while a batch was in use
            self.release(number)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class Arena:
    """A slab being filled, in a worker."""

    def __init__(self, slabs: Slabs, number: int) -> None:
        self.slabs, self.number = slabs, number
        self._bytes = torch.frombuffer(slabs.memory[number], dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An unfilled tensor in the slab, or anywhere when it has no room left."""
        start = -(-self._used // ALIGN) * ALIGN
        stop = start + prod(shape) * dtype.itemsize
        if stop > len(self._bytes):
            return torch.empty(tuple(shape), dtype=dtype)
        self._used = stop
        return self._bytes[start:stop].view(dtype).view(tuple(shape))

    def sealed(self, batch: Batch) -> Parcel | Batch:
        """The batch to be sent, with all of its tensors in the slab, or as it is where they do not fit."""
        layout: Layout = {}
        begin = self._bytes.data_ptr()
        for name, tensor in batch.tensors.items():
            place = tensor.data_ptr() - begin if tensor.numel() else 0  # one without elements has no address
            if tensor.numel() and not (0 <= place <= self._used - tensor.nbytes and tensor.is_contiguous()):
                inside = self.empty(tensor.shape, tensor.dtype)
                place = inside.data_ptr() - begin
                if not 0 <= place <= len(self._bytes) - tensor.nbytes:
                    batch.tensors = {name: tensor.clone() for name, tensor in batch.tensors.items()}
                    self.slabs.release(self.number)
                    return batch
                inside.copy_(tensor)
            layout[name] = place, tuple(tensor.shape), tensor.dtype
        return Parcel(self, layout, Batch(batch.dataset, {}, batch.keys, batch.bad, batch.retries))


class Parcel:
    """What goes through the queue; it arrives as the batch."""

    def __init__(self, arena: Arena, layout: Layout, batch: Batch) -> None:
        self.arena, self.layout, self.batch = arena, layout, batch

    def __reduce__(self) -> tuple[Any, ...]:
        return opened, (self.arena.slabs.key, self.arena.number, self.layout, self.batch)


def opened(key: int, number: int, layout: Layout, batch: Batch) -> Batch:
    """The batch of a slab, in the process that made the slabs."""
    whole = _known[key].whole(number)
    for name, (place, shape, dtype) in layout.items():
        batch.tensors[name] = whole[place : place + prod(shape) * dtype.itemsize].view(dtype).view(shape)
    return batch


def in_slabs(dataset: StepDataset, number: int) -> Dataset[Any]:
    """The dataset with `number` slabs as large as its largest batch can be; as it is where workers are not forked."""
    most = 0
    for source in dataset.sources:
        collate = dataset.collate[source.spec.name]
        rows = source.spec.batch_size // (dataset.world * dataset.micro)
        most = max(most, collate.most_bytes(source.spec, rows) if hasattr(collate, "most_bytes") else 0)
    if not most or multiprocessing.get_start_method() != "fork":
        return dataset
    return InSlabs(dataset, list(dataset.collate.values()), Slabs(number, min(most + SPARE, MOST_BYTES)))


class InSlabs(Dataset[Any]):
    """A dataset of batches whose workers write them into slabs; `collates` are told where."""

    def __init__(self, dataset: Dataset[Any], collates: Sequence[Any], slabs: Slabs) -> None:
        self.dataset, self.slabs = dataset, slabs
        self.collates = list({id(collate): collate for collate in collates if hasattr(collate, "empty")}.values())

    def __getitem__(self, place: Any) -> Any:
        arena = self.slabs.take()
        if arena is None:
            return self.dataset[place]
        for collate in self.collates:
            collate.empty = arena.empty
        try:
            item = self.dataset[place]
        finally:
            for collate in self.collates:
                del collate.empty  # the class's own again
        if isinstance(item, Batch):
            return arena.sealed(item)
        self.slabs.release(arena.number)
        return item

    def __getstate__(self) -> None:
        raise TypeError("slabs are for forked processes only")
