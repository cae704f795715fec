"""Reads that fail: repeated, counted, and at last the end of the run."""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from data.batches.collate import FlamingoCollate
from data.dataset import DatasetSpec, open_store
from data.errors import StorageError
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


def test_storage_is_waited_for_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_documents(tmp_path, count=4)
    expected = reader_of(folder, Retry()).sample(0, 2)
    reader = reader_of(folder, Retry(first_wait=0.001))
    once, left = reader._once, [30]  # more failures than there ever were attempts

    def failing(shard: int, offset: int, size: int) -> bytes:
        left[0] -= 1
        if left[0] > 0:
            raise OSError(116, "Stale file handle")
        return once(shard, offset, size)

    monkeypatch.setattr(reader, "_once", failing)
    monkeypatch.setattr("data.shards.retry.LONGEST_WAIT", 0.002)
    assert reader.sample(0, 2).nodes == expected.nodes
    reader.retry.patience, left[0] = 0.2, 10**9
    with pytest.raises(StorageError, match=r"could not be read in \d+ attempts over 0\.\d s: .*Stale file handle"):
        reader.sample(0, 3)


def test_what_is_waited_for_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("data.shards.retry.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("data.shards.retry.time.sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))

    def read() -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(StorageError, match=r"^shard x could not be read in \d+ attempts over 300\.0 s: "):
        Retry()(read, "shard x")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("warning: shard x cannot be read ([Errno 5] Input/output error); tried for 6 s of 300 s")
    assert 4 <= len(lines) <= 6  # then about one a minute


@pytest.mark.parametrize("index", ["mapped", "not mapped", "none"])
def test_a_folder_that_is_away_when_a_shard_is_first_met(tmp_path: Path, index: str) -> None:
    folder = write_documents(tmp_path / "here", count=8)
    store = open_store(one(folder))
    store.reader.retry.first_wait = 0.02
    if index == "mapped":
        store.indexes[1]
    if index == "none":
        (folder / "documents-000001.tar.idx").unlink()
    folder.rename(tmp_path / "away")
    thread = later(lambda: (tmp_path / "away").rename(folder), 0.2)
    assert store.read(1, 0).key == "documents-000001-00000000"
    thread.join()
    assert store.reader.retry.repeats >= 1


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_storage_that_stays_away_is_told_from_other_ends(tmp_path: Path, workers: int) -> None:
    folder = write_documents(tmp_path, count=8)
    loader = MixLoader([one(folder)], COLLATE, num_workers=workers, storage_seconds=0.1)
    steps, taken = iter(loader), list[Any]()
    next(steps)
    for path in folder.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(StorageError, match="could not be read in"):
        deque(map(taken.append, steps), maxlen=0)
    assert loader.state_dict()["step"] == 1 + len(taken) < 20  # the steps that were delivered
