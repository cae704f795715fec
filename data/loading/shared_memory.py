"""Batches on their way from a worker to the trainer: written once, into memory that both share, and never copied.

torch makes a new file in memory for every tensor of every batch: each page of it is cleared and mapped again, and every
handle goes through a socket. Here are a few buffers, made before the workers are forked and used again and again. A
worker takes a free one, its collate writes the batch into it, and only the number of the buffer and the offsets of the
tensors go through the queue. When the last tensor of the batch is gone in the trainer, the buffer is free.

Nobody ever waits for a buffer: a batch that finds none free, or is larger than one, travels as torch's own tensors. The
memory is anonymous, so the size of /dev/shm (64 MB in a container) is not a limit.
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
MAX_BYTES = 1 << 31  # of a buffer; pages that no batch has touched take no memory
SPARE = 1 << 14  # bytes for the gaps between tensors
NUMBER_BYTES = 2  # of a buffer's number in the pipe
_numbers = count()
_known: weakref.WeakValueDictionary[int, SharedBuffers] = weakref.WeakValueDictionary()

Layout = dict[str, tuple[int, tuple[int, ...], torch.dtype]]
"""Name of a tensor to its offset in the buffer, shape and type."""


class SharedBuffers:
    """`count` buffers of `size` bytes, shared by the process that makes them and those that it forks from then on."""

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
        """Mark a buffer as free."""
        os.write(self._give, number.to_bytes(NUMBER_BYTES, "little"))

    def take(self) -> BufferWriter | None:
        """Return a free buffer to write a batch into; None when there is none."""
        try:
            number = int.from_bytes(os.read(self._free, NUMBER_BYTES), "little")
        except BlockingIOError:
            return None
        return BufferWriter(self, number)

    def whole(self, number: int) -> Tensor:
        """Return the bytes of a buffer, which is released when the last tensor made of them is gone."""
        view = np.frombuffer(self.memory[number], dtype=np.uint8)
        weakref.finalize(view, self._gone, number).atexit = False
        return torch.from_numpy(view)

    def _gone(self, number: int) -> None:
        if os.getpid() == self._owner:  # not in a process that was forked while a batch was in use
            self.release(number)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class BufferWriter:
    """A buffer being filled, in a worker."""

    def __init__(self, buffers: SharedBuffers, number: int) -> None:
        self.buffers, self.number = buffers, number
        self._bytes = torch.frombuffer(buffers.memory[number], dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an unfilled tensor in the buffer, or in ordinary memory when the buffer is full."""
        start = -(-self._used // ALIGN) * ALIGN
        stop = start + prod(shape) * dtype.itemsize
        if stop > len(self._bytes):
            return torch.empty(tuple(shape), dtype=dtype)
        self._used = stop
        return self._bytes[start:stop].view(dtype).view(tuple(shape))

    def sealed(self, batch: Batch) -> SharedBatch | Batch:
        """Return the batch to send, with all of its tensors in the buffer, or as it is when they do not fit."""
        layout: Layout = {}
        begin = self._bytes.data_ptr()
        for name, tensor in batch.tensors.items():
            offset = tensor.data_ptr() - begin if tensor.numel() else 0  # a tensor without elements has no address
            if tensor.numel() and not (0 <= offset <= self._used - tensor.nbytes and tensor.is_contiguous()):
                # Made elsewhere (padding, counts): copy it in, unless the buffer is full.
                inside = self.empty(tensor.shape, tensor.dtype)
                offset = inside.data_ptr() - begin
                if not 0 <= offset <= len(self._bytes) - tensor.nbytes:
                    batch.tensors = {name: tensor.clone() for name, tensor in batch.tensors.items()}
                    self.buffers.release(self.number)
                    return batch
                inside.copy_(tensor)
            layout[name] = offset, tuple(tensor.shape), tensor.dtype
        return SharedBatch(self, layout, Batch(batch.dataset, {}, batch.keys, batch.bad, batch.retries))


class SharedBatch:
    """What goes through the queue; unpickled, it is the batch."""

    def __init__(self, writer: BufferWriter, layout: Layout, batch: Batch) -> None:
        self.writer, self.layout, self.batch = writer, layout, batch

    def __reduce__(self) -> tuple[Any, ...]:
        return received, (self.writer.buffers.key, self.writer.number, self.layout, self.batch)


def received(key: int, number: int, layout: Layout, batch: Batch) -> Batch:
    """Return the batch in a buffer, in the process that made the buffers."""
    whole = _known[key].whole(number)
    for name, (offset, shape, dtype) in layout.items():
        batch.tensors[name] = whole[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)
    return batch


def with_shared_buffers(dataset: StepDataset, count: int) -> Dataset[Any]:
    """Return the dataset with `count` buffers as large as its largest batch; unchanged where workers are not forked."""
    most = 0
    for opened in dataset.datasets:
        collate = dataset.collate[opened.spec.name]
        rows = opened.spec.batch_size // (dataset.world * dataset.micro)
        most = max(most, collate.most_bytes(opened.spec, rows) if hasattr(collate, "most_bytes") else 0)
    if not most or multiprocessing.get_start_method() != "fork":
        return dataset
    return SharedMemoryDataset(
        dataset, list(dataset.collate.values()), SharedBuffers(count, min(most + SPARE, MAX_BYTES))
    )


class SharedMemoryDataset(Dataset[Any]):
    """A dataset of batches whose workers write them into buffers; their collates take memory from there."""

    def __init__(self, dataset: Dataset[Any], collates: Sequence[Any], buffers: SharedBuffers) -> None:
        self.dataset, self.buffers = dataset, buffers
        self.collates = list({id(collate): collate for collate in collates if hasattr(collate, "empty")}.values())

    def __getitem__(self, index: Any) -> Any:
        writer = self.buffers.take()
        if writer is None:
            return self.dataset[index]
        for collate in self.collates:
            collate.empty = writer.empty
        try:
            item = self.dataset[index]
        finally:
            for collate in self.collates:
                del collate.empty  # back to the class's own
        if isinstance(item, Batch):
            return writer.sealed(item)
        self.buffers.release(writer.number)
        return item

    def __getstate__(self) -> None:
        raise TypeError("shared buffers reach forked processes only; use the start method 'fork'")
