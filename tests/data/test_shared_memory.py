"""Batches through shared buffers: equal tensors, buffers that come back, and ordinary memory where they do not."""

from __future__ import annotations

import gc
import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.batches.batch import Batch
from data.batches.collate import FlamingoCollate, LanguageCollate
from data.dataset import DatasetSpec
from data.loading.loader import MixLoader
from data.loading.shared_memory import SharedBuffers
from tests.data.helpers import byte_processor, same, write_documents
from tests.fixtures import byte_tokenizer


def tensors() -> dict[str, Tensor]:
    return {
        "pixels": torch.arange(60, dtype=torch.uint8).view(5, 3, 4),
        "ids": torch.arange(7),
        "turned": torch.arange(6.0).view(2, 3).T,
        "none": torch.empty((0, 3), dtype=torch.int64),
    }


def sent(buffers: SharedBuffers, given: dict[str, Tensor]) -> Batch:
    """A batch as it arrives; its pixels were made in the buffer, the rest elsewhere."""
    writer = buffers.take()
    assert writer is not None
    pixels = writer.empty(given["pixels"].shape, torch.uint8)
    pixels.copy_(given["pixels"])
    made = writer.sealed(Batch("d", given | {"pixels": pixels}, ["k"]))
    del writer, pixels
    received: Batch = pickle.loads(pickle.dumps(made))
    return received


def test_a_batch_arrives_as_it_was_and_its_buffer_comes_back() -> None:
    buffers = SharedBuffers(1, 4096)
    for _ in range(3):
        batch = sent(buffers, tensors())
        assert batch.keys == ["k"]
        assert same(batch.tensors, tensors())
        storages = {tensor.untyped_storage().data_ptr() for tensor in batch.tensors.values()}
        assert len(storages) == 1
        assert buffers.take() is None  # as long as anything of the batch is there
        part = batch.tensors["pixels"][1]
        del batch
        gc.collect()
        assert buffers.take() is None
        assert part.tolist() == tensors()["pixels"][1].tolist()
        del part
        gc.collect()
        writer = buffers.take()
        assert writer is not None
        buffers.release(writer.number)


def test_what_does_not_fit_goes_the_ordinary_way() -> None:
    buffers = SharedBuffers(1, 100)
    given = tensors() | {"more": torch.arange(100)}
    batch = sent(buffers, given)
    assert same(batch.tensors, given)
    assert buffers.take() is not None  # given back at once


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_gives_nothing_back() -> None:
    buffers = SharedBuffers(1, 4096)
    batch = sent(buffers, tensors())
    child = os.fork()
    if child == 0:
        batch.tensors.clear()
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert buffers.take() is None
    assert same(batch.tensors, tensors())


@pytest.mark.slow
@pytest.mark.parametrize("pack", [0, 256])
def test_workers_give_what_is_made_here(tmp_path: Path, pack: int) -> None:
    folder = str(write_documents(tmp_path))
    spec = DatasetSpec(name="d", shards=[folder], batch_size=8, pack=pack, next_image_probability=0.5)
    text = DatasetSpec(name="t", shards=[folder], batch_size=4, kind="text")
    collates: dict[str, Any] = {"d": FlamingoCollate(byte_processor()), "t": LanguageCollate(byte_tokenizer())}
    here = MixLoader([spec, text], collates, prefetch_factor=0)
    there = MixLoader([spec, text], collates, num_workers=2)
    kept = list(itertools.islice(there, 30))  # many more than there are buffers
    for mine, other in zip(itertools.islice(here, 30), kept, strict=True):
        for name in ("d", "t"):
            assert same(mine.batches[name][0].tensors, other.batches[name][0].tensors)
    first = kept[0].batches["d"][0].tensors
    assert first["pixel_values"].untyped_storage().data_ptr() == first["phi"].untyped_storage().data_ptr()
    assert (collates["d"].empty((2,), torch.uint8)).shape == (2,)  # nothing is left behind in this process
