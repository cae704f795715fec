"""A dataset opened and laid out in order, and the map from (dataset, step, micro-batch) to a batch."""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, get_worker_info

from data.batches.batch import Batch
from data.batches.collate import Collate
from data.dataset import DatasetSpec, open_store
from data.errors import BadSample, ContentError, PassedOver, StorageError
from data.order import SAMPLE, Plan, Slot, dataset_seed, stream
from data.shard_store import ShardStore
from data.shards.retry import PATIENCE
from data.store import DocumentStore
from flamingo.errors import UserError

ATTEMPTS = 8  # replacements tried for a bad sample
BatchIndex = tuple[int, int, int]  # dataset, step, micro-batch


@dataclass(slots=True)
class OpenDataset:
    """A dataset with its store opened and its order laid out; `origin` is the lane position of step 0."""

    spec: DatasetSpec
    store: DocumentStore
    plan: Plan
    origin: int = 0

    @classmethod
    def open(
        cls,
        spec: DatasetSpec,
        seed: int,
        rank: int = 0,
        world: int = 1,
        store: DocumentStore | None = None,
        storage_seconds: float = PATIENCE,
    ) -> OpenDataset:
        """Open the dataset's shards, unless a store is given. Raises UserError for missing or truncated shards."""
        store = open_store(spec, rank, world, storage_seconds) if store is None else store
        lengths = np.array(store.lengths(), dtype=np.int64)
        if lengths.sum() == 0:
            raise UserError(f"dataset {spec.name!r} has no samples")
        return cls(spec, store, Plan(lengths, dataset_seed(seed, spec.name), spec.batch_size, spec.lanes, spec.block))

    @property
    def shards(self) -> ShardStore | None:
        """The store when it is one of tars: only those have files to limit, retries to count and a cache to fill."""
        return self.store if isinstance(self.store, ShardStore) else None

    def lane_position(self, step: int) -> int:
        """Return how many samples each lane has given before this step."""
        return self.origin + step * self.plan.per_lane

    def fingerprint(self, seed: int) -> dict[str, Any]:
        """Return what the order depends on. Two runs with equal fingerprints have the same order of samples."""
        return {"seed": seed, "lanes": self.plan.lanes, "block": self.plan.block} | self.store.fingerprint()

    def slots(self, step: int) -> list[Slot]:
        """Return the samples of the global batch of a step, before any replacement."""
        plan = dataclasses.replace(self.plan)  # with caches of its own: a thread may be reading ahead with the other
        start = self.lane_position(step)
        return [plan.at(*plan.place(slot, start)) for slot in range(self.spec.batch_size)]


def most_open_files(wanted: int = 1 << 14) -> int:
    """Return how many files this process (and the workers it forks) may open, after raising the limit to `wanted`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= limit:
        return limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


@dataclass(slots=True)
class Failure:
    """A UserError on its way out of a worker: as an exception it would arrive wrapped in the worker's traceback."""

    message: str
    storage: bool


class StepDataset(Dataset[Batch | Failure]):
    """Map-style: (dataset, step, micro-batch) to that batch of this rank. Holds no state that matters."""

    def __init__(
        self,
        datasets: Sequence[OpenDataset],
        collate: dict[str, Collate],
        rank: int,
        world: int,
        micro: int,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.datasets, self.collate = datasets, collate
        self.rank, self.world, self.micro = rank, world, micro
        self.heartbeat = heartbeat or Heartbeat(1)
        limit = most_open_files() // (4 * len(datasets))  # a tar and its index are a file each; half is left to others
        for dataset in datasets:
            if dataset.shards is not None:
                dataset.shards.limit_files(limit)

    def slots(self, number: int, micro: int) -> range:
        """Return the slots of a dataset's global batch that make up this rank's micro-batch."""
        size = self.datasets[number].spec.batch_size // (self.world * self.micro)
        first = (self.rank * self.micro + micro) * size
        return range(first, first + size)

    def __getitem__(self, index: BatchIndex) -> Batch | Failure:
        try:
            return self._batch(index)
        except UserError as error:
            return Failure(str(error), isinstance(error, StorageError))

    def _batch(self, index: BatchIndex) -> Batch:
        number, step, micro = index
        dataset = self.datasets[number]
        batch = Batch(dataset.spec.name, {}, [])
        samples = []
        info = get_worker_info()
        worker = 0 if info is None else info.id
        repeats = _repeated_reads(dataset)
        for slot in self.slots(number, micro):
            lane, n = dataset.plan.place(slot, dataset.lane_position(step))
            samples.append(self._sample(number, step, lane, n, batch, worker))
        batch.tensors = self.collate[dataset.spec.name].batch(dataset.spec, samples)
        batch.retries = _repeated_reads(dataset) - repeats
        self.heartbeat.idle(worker)
        return batch

    def _sample(self, number: int, step: int, lane: int, n: int, batch: Batch, worker: int) -> Any:
        """Return sample n of a lane, or its replacement when it is bad or passed over; `batch` notes the bad ones."""
        dataset = self.datasets[number]
        spec, store, plan = dataset.spec, dataset.store, dataset.plan
        for attempt in range(ATTEMPTS + 1):
            at = plan.replacement(lane, n, attempt) if attempt else plan.at(lane, n)
            self.heartbeat.beat(worker, number, step, at.shard, at.row)
            if attempt == ATTEMPTS:
                # Never pass over the last one: where every document has a single image, no other can replace it.
                spec = dataclasses.replace(spec, single_image_share=1.0)
            try:
                raw = store.read(at.shard, at.row, images=spec.kind != "text")
                # Keyed by the row in the shard, so a sample is cropped alike by datasets that use different rows of it.
                row = at.row if raw.row is None else raw.row
                random = stream(plan.seed, SAMPLE, at.epoch, at.shard, row)
                sample = self.collate[spec.name].sample(spec, raw, random)
            except PassedOver:
                continue
            except ContentError as error:
                shard, key = store.key(at.shard, at.row)
                bad = BadSample(spec.name, error.reason, shard, key, error.detail)
                batch.bad.append(bad)
                continue
            batch.keys.append(raw.key)
            return sample
        raise UserError(
            f"dataset {spec.name!r}: a sample and its {ATTEMPTS} replacements were all bad, the last one key "
            f"{bad.key!r} of {bad.shard}: {bad.reason}, {bad.detail}; find them with: python -m data verify"
        )

    def describe(self, number: int, part: int, row: int) -> str:
        """Return a sample in words, without reading anything: the storage may be what hangs."""
        dataset = self.datasets[number]
        where = f"part {part}" if dataset.shards is None else f"shard {dataset.shards.shards[part].path}"
        return f"dataset {dataset.spec.name!r}, {where}, sample {row}"


def _repeated_reads(dataset: OpenDataset) -> int:
    return 0 if dataset.shards is None else dataset.shards.reader.retry.repeats


class StepSampler(Sampler[BatchIndex]):
    """The indices of all batches from a step on, without end: step by step, dataset by dataset."""

    def __init__(self, start: int, datasets: int, micro: int) -> None:
        self.start, self.datasets, self.micro = start, datasets, micro

    def __iter__(self) -> Iterator[BatchIndex]:
        step = self.start
        while True:
            for dataset in range(self.datasets):
                yield from ((dataset, step, micro) for micro in range(self.micro))
            step += 1


IDLE = -1


class Heartbeat:
    """A row per worker: dataset, step, part, row, and since when (nanoseconds of the machine's monotonic clock)."""

    def __init__(self, workers: int) -> None:
        self.shared = torch.full((max(1, workers), 5), IDLE, dtype=torch.int64).share_memory_()
        self._rows = self.shared.numpy()

    def __getstate__(self) -> torch.Tensor:
        return self.shared  # pickled as a handle to the same memory

    def __setstate__(self, shared: torch.Tensor) -> None:
        self.shared, self._rows = shared, shared.numpy()

    def beat(self, worker: int, dataset: int, step: int, part: int, row: int) -> None:
        """Note that a worker begins to read a sample."""
        self._rows[worker] = (dataset, step, part, row, time.monotonic_ns())

    def idle(self, worker: int) -> None:
        """Note that a worker has finished its batch."""
        self._rows[worker, 0] = IDLE

    def report(self, rank: int, describe: Callable[[int, int, int], str]) -> str:
        """Return what each worker is reading and for how long; `describe(dataset, part, row)` names a sample."""
        now = time.monotonic_ns()
        busy = []
        for worker, (dataset, step, part, row, since) in enumerate(self._rows.tolist()):
            if dataset != IDLE:
                sample = describe(dataset, part, row)
                busy.append(f"worker {worker} is at step {step}, {sample} for {(now - since) / 1e9:.0f} s")
        return f"rank {rank}: " + ("; ".join(busy) or "no worker is reading anything")
