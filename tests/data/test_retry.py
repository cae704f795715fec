"""Reads that fail: repeated, counted, and at last the end of the run."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from data.batches.collate import FlamingoCollate
from data.dataset import DatasetSpec, open_store
from data.loading.loader import MixLoader
from data.shards.reader import ShardReader
from data.shards.retry import Retry
from flamingo.errors import UserError
from tests.data.helpers import byte_processor, shards_of, write_documents

COLLATE = FlamingoCollate(byte_processor())


def one(folder: Path) -> DatasetSpec:
    return DatasetSpec(name="d", shards=[str(folder)], batch_size=4)


def reader_of(folder: Path, retry: Retry) -> ShardReader:
    return ShardReader(open_store(one(folder)).indexes, retry=retry)


def later(action: Any, seconds: float) -> threading.Thread:
    def run() -> None:
        time.sleep(seconds)
        action()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("trouble", ["missing", "short"])
def test_a_read_that_fails_for_a_while_is_repeated(tmp_path: Path, trouble: str) -> None:
    folder = write_documents(tmp_path, count=4)
    shard, aside = folder / "documents-000000.tar", folder / "aside"
    expected = reader_of(folder, Retry()).sample(0, 2)
    reader = reader_of(folder, Retry(first_wait=0.05))
    reader.indexes[0]
    whole = shard.read_bytes()
    if trouble == "missing":
        shard.rename(aside)
        thread = later(lambda: aside.rename(shard), 0.1)
    else:
        shard.write_bytes(whole[:600])
        thread = later(lambda: shard.write_bytes(whole), 0.1)
    sample = reader.sample(0, 2)
    thread.join()
    assert (sample.key, sample.nodes) == (expected.key, expected.nodes)
    assert reader.retry.repeats >= 1


@pytest.mark.parametrize(("trouble", "words"), [("missing", "it does not exist"), ("short", "it is truncated: byte")])
def test_a_read_that_keeps_failing_stops_the_run(tmp_path: Path, trouble: str, words: str) -> None:
    folder = write_documents(tmp_path, count=4)
    shard = folder / "documents-000000.tar"
    reader = reader_of(folder, Retry(attempts=3, first_wait=0.01))
    reader.indexes[0]
    if trouble == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(UserError) as caught:
        reader.sample(0, 3)
    assert f"shard {shard} could not be read in 3 attempts over 0." in str(caught.value)
    assert words in str(caught.value)
    assert reader.retry.repeats == 3  # the first attempt, and two of three after it


def test_repeated_reads_are_counted_in_the_batch(tmp_path: Path) -> None:
    folder = write_documents(tmp_path, count=4)
    loader = MixLoader([one(folder)], COLLATE, prefetch_factor=0)
    shards_of(loader).reader.retry.first_wait = 0.05
    shards_of(loader).indexes[0]
    shard, aside = folder / "documents-000000.tar", folder / "aside"
    shard.rename(aside)
    thread = later(lambda: aside.rename(shard), 0.1)
    batch = next(iter(loader)).batches["d"][0]
    thread.join()
    assert batch.retries >= 1
