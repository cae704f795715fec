"""Batches for a training step from a mixture of datasets, and a state of a few integers.

Every step has one batch of every dataset (the paper's accumulation: gradients of all datasets, then one update), each
cut into the micro-batches of this rank. One pool of workers serves all datasets. A batch depends on its step alone
(`data.order`), so every world size and every number of workers gives the same global batches, and resuming means
starting at another step: nothing is replayed, no worker has state. Steps are counted when they are delivered; what
workers had read ahead is read again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.batches.batch import Batch, StepBatches
from data.batches.collate import Collate
from data.dataset import DatasetSpec
from data.errors import BadSampleCounter, BadSampleLog, StorageError, warn
from data.loading.shared_memory import with_shared_buffers
from data.loading.step_dataset import Failure, Heartbeat, OpenDataset, StepDataset, StepSampler
from data.loading.workers import Ahead, InTurn, Supply, WorkerLostError, Workers
from data.remote.download import is_remote
from data.remote.shard_cache import ShardCache
from data.shard_store import ShardStore
from data.shards.retry import PATIENCE
from data.store import DocumentStore
from flamingo.errors import UserError

__all__ = ["Batch", "MixLoader", "StepBatches", "StorageError"]
STATE_VERSION = 1


class MixLoader:
    """An endless iterator over `StepBatches`, from the step after the last one delivered.

    `collate` serves all datasets, or is a dictionary by dataset name. `stores` gives the samples of datasets that are
    not in shards, by dataset name. `rank` and `world_size` are those of the data parallel group (they are never read
    from the environment). With `num_workers=0` batches are made in this process, by a thread that is `prefetch_factor`
    steps ahead (0: when they are asked for). `bad_samples` is a file that gets a JSON line for every replaced sample.
    Shards that cannot be read are waited for `storage_seconds`. When no batch arrives for `patience` seconds, a line on
    stderr names rank, worker and shard; after `give_up` seconds the run stops with that line (half an hour, and longer
    than storage is waited for).

    Raises UserError before the first batch for shards that are missing, truncated or changed, and for batch sizes that
    cannot be divided; later for too many bad samples, and a worker that hangs or is killed; StorageError for reads that
    keep failing.
    """

    def __init__(
        self,
        specs: Sequence[DatasetSpec],
        collate: Collate | dict[str, Collate],
        *,
        stores: Mapping[str, DocumentStore] | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        micro_batches: int = 1,
        start_step: int = 0,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        max_bad_rate: float = 0.02,
        bad_samples: str | Path | None = None,
        storage_seconds: float = PATIENCE,
        patience: float = 60.0,
        give_up: float | None = None,
    ) -> None:
        names = [spec.name for spec in specs]
        if not names or len(set(names)) < len(names):
            raise UserError(f"the mixture needs datasets with different names, it has {names or 'none'}")
        stores = stores or {}
        if unknown := sorted(stores.keys() - set(names)):
            raise UserError(f"stores are given for {unknown}, the mixture has the datasets {names}; correct the names")
        for spec in specs:
            if spec.batch_size % (world_size * micro_batches):
                raise UserError(
                    f"dataset {spec.name!r}: batch_size={spec.batch_size} cannot be divided among {world_size} "
                    f"processes x {micro_batches} micro-batches; use a multiple of {world_size * micro_batches}"
                )
        by_name = collate if isinstance(collate, dict) else dict.fromkeys(names, collate)
        for spec in specs:
            if spec.pack and not getattr(by_name[spec.name], "can_pack", False):
                raise UserError(
                    f"dataset {spec.name!r}: pack={spec.pack} needs the collate of a Flamingo objective; use pack=0"
                )
        self.seed, self.step = seed, start_step
        self.datasets = [
            OpenDataset.open(spec, seed, rank, world_size, stores.get(spec.name), storage_seconds) for spec in specs
        ]
        heartbeat = Heartbeat(num_workers)
        self.step_dataset = StepDataset(self.datasets, by_name, rank, world_size, micro_batches, heartbeat)
        self.num_workers, self.prefetch_factor, self.pin_memory = num_workers, prefetch_factor, pin_memory
        self.give_up = max(1800.0, storage_seconds + patience) if give_up is None else give_up
        self.patience = min(patience, self.give_up / 4)
        self.bad = BadSampleCounter(max_bad_rate)
        self.log = BadSampleLog(Path(bad_samples), rank, world_size) if bad_samples is not None else None

    def __iter__(self) -> Iterator[StepBatches]:
        micro = self.step_dataset.micro
        if self.log is not None:
            self.log.start(self.step)
        with closing(self._supply()) as supply, closing(Prefetcher(self.step_dataset)) as prefetcher:
            while True:
                step = self.step
                prefetcher.advance(step)
                batches = {
                    dataset.spec.name: [self._checked(self._taken(supply)) for _ in range(micro)]
                    for dataset in self.datasets
                }
                if self.log is not None:
                    self.log.write(step, (bad for micro in batches.values() for batch in micro for bad in batch.bad))
                self.step = step + 1
                yield StepBatches(step, batches)

    def take(self, steps: Iterator[StepBatches]) -> tuple[Mapping[str, Sequence[Batch]], StorageError | None]:
        """Return the batches of the next of this loader's steps, or none of any dataset and why.

        So a trainer can save before it ends, together with processes that have theirs. Raises as `__iter__` otherwise.
        """
        try:
            return next(steps).batches, None
        except StorageError as error:
            return {dataset.spec.name: [] for dataset in self.datasets}, error

    def _supply(self) -> Supply:
        step_dataset, batches = self.step_dataset, len(self.datasets) * self.step_dataset.micro  # batches of a step
        sampler = StepSampler(self.step, len(self.datasets), step_dataset.micro)
        if self.num_workers:
            ahead = self.num_workers * max(1, self.prefetch_factor)
            # Buffers for what is read ahead, for this step, and for the last one, which the trainer may still hold.
            dataset = with_shared_buffers(step_dataset, ahead + 2 * batches + 1)
            return Workers(dataset, sampler, self.num_workers, self.prefetch_factor, self.pin_memory, self.patience)
        if self.prefetch_factor:
            return Ahead(step_dataset.__getitem__, iter(sampler), self.prefetch_factor * batches, self.patience)
        return InTurn(step_dataset.__getitem__, iter(sampler))

    def _taken(self, supply: Supply) -> Batch | Failure:
        """Return the next batch. Warns while it does not come, and raises UserError when it is given up."""
        begun = time.monotonic()
        while True:
            try:
                return supply.take()
            except TimeoutError:
                waited = time.monotonic() - begun
                report = f"no batch for {waited:.0f} s; {self._report()}"
                if waited >= self.give_up:
                    raise UserError(f"{report}; the run stops (limit {self.give_up:.0f} s)") from None
                warn(report)
            except WorkerLostError as error:
                raise UserError(
                    f"a loader process ended: {str(error).split(' This might be')[0]}; {self._report()}; if memory ran "
                    "out use fewer workers, else look at that sample: python -m data verify"
                ) from None

    def _report(self) -> str:
        return self.step_dataset.heartbeat.report(self.step_dataset.rank, self.step_dataset.describe)

    def _checked(self, item: Batch | Failure) -> Batch:
        if isinstance(item, Failure):
            raise (StorageError if item.storage else UserError)(item.message)
        self.bad.add(len(item.keys), item.bad)
        return item

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the steps delivered so far, equal on every rank, and what the order depends on."""
        return {
            "v": STATE_VERSION,
            "step": self.step,
            "datasets": {d.spec.name: {"lane_position": d.lane_position(self.step)} for d in self.datasets},
            "plan": {d.spec.name: d.fingerprint(self.seed) for d in self.datasets},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, with any world size and number of workers.

        Batch sizes may differ as long as the lanes are the same: no sample is lost or repeated. Raises UserError,
        naming what differs, when the order is a different one (other samples, seed, lanes or block).
        """
        if state.get("v") != STATE_VERSION:
            raise UserError(f"loader state has version {state.get('v')!r}, this program reads version {STATE_VERSION}")
        mine = {dataset.spec.name: dataset.fingerprint(self.seed) for dataset in self.datasets}
        if mine.keys() != state["plan"].keys():
            raise UserError(f"the state is of datasets {sorted(state['plan'])}, this mixture has {sorted(mine)}")
        for name, plan in mine.items():
            saved = state["plan"][name]
            changed = [f"{k} {saved.get(k)!r} -> {v!r}" for k, v in plan.items() if saved.get(k) != v]
            if changed:
                raise UserError(
                    f"dataset {name!r} differs from the saved state ({'; '.join(changed)}); resume with the same data "
                    "and seed, or start a new run"
                )
        self.step = int(state["step"])
        for dataset in self.datasets:
            position = int(state["datasets"][dataset.spec.name]["lane_position"])
            dataset.origin = position - self.step * dataset.plan.per_lane

    def explain(self, step: int) -> list[tuple[str, str, str]]:
        """Return (dataset, shard, key) of a step's global batch, all ranks, before any replacement of bad samples."""
        return [
            (dataset.spec.name, *dataset.store.key(at.shard, at.row))
            for dataset in self.datasets
            for at in dataset.slots(step)
        ]


DOWNLOADS_AT_ONCE = 4


class Prefetcher:
    """Threads that fill the caches of a rank's datasets; none when no shard is remote.

    Raises UserError when a cache cannot even hold what the lanes are reading now: every shard would be fetched again
    and again.
    """

    def __init__(self, dataset: StepDataset) -> None:
        self.dataset = dataset
        self._plans = [replace(opened.plan) for opened in dataset.datasets]
        self._remote = [
            (number, opened.shards, opened.shards.cache)
            for number, opened in enumerate(dataset.datasets)
            if opened.shards is not None and opened.shards.cache is not None
        ]
        self._pool: ThreadPoolExecutor | None = None
        self._known: set[tuple[int, int]] = set()  # (dataset, first sample of a block) of what was asked for last
        self._under_way: dict[str, Future[str]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def advance(self, step: int) -> None:
        """Ask for the shards that training needs at a step and soon after."""
        if not self._remote:
            return
        if self._pool is None:  # created late: worker processes must be forked before threads exist
            self._pool = ThreadPoolExecutor(DOWNLOADS_AT_ONCE, thread_name_prefix="shards ahead")
        for number, store, cache in self._remote:
            self._ask(number, store, cache, step, self._pool)

    def _ask(self, number: int, store: ShardStore, cache: ShardCache, step: int, pool: ThreadPoolExecutor) -> None:
        spec = self.dataset.datasets[number].spec
        now, later = ([*blocks] for blocks in zip(*self._blocks(number, step), strict=True))
        asked = {(number, first) for _, first in now}
        if asked <= self._known:
            return
        self._known = {known for known in self._known if known[0] != number} | asked
        needed = sum(store.shards[shard].head.tar_size for shard in {shard for shards, _ in now for shard in shards})
        if needed > cache.limit:
            raise UserError(
                f"dataset {spec.name!r}: this rank draws from {needed} bytes of shards at a time and the cache "
                f"{cache.folder} may hold {cache.limit}; raise cache_gb or lower block={spec.block}"
            )
        wanted = list(dict.fromkeys(shard for shards, _ in [*now, *later] for shard in shards))
        room = cache.limit
        for shard in wanted:
            path = store.shards[shard].path
            room -= store.shards[shard].head.tar_size
            if not is_remote(path) or room < 0:
                continue
            with self._lock:
                if not cache.has(path) and path not in self._under_way:
                    self._under_way[path] = pool.submit(self._fetch, cache, path)

    def _fetch(self, cache: ShardCache, path: str) -> str:
        try:
            with suppress(UserError):  # reading the shard will raise it again, where it can be reported
                return cache.local(path, wanted=lambda: not self._closed)
            return ""
        finally:
            with self._lock:
                self._under_way.pop(path, None)

    def _blocks(self, number: int, step: int) -> Iterator[tuple[tuple[list[int], int], tuple[list[int], int]]]:
        """Yield (shards, first sample of the block after) of the block now and the next, for each lane of this rank."""
        dataset: OpenDataset = self.dataset.datasets[number]
        plan, position = self._plans[number], dataset.lane_position(step)
        slots = [slot for micro in range(self.dataset.micro) for slot in self.dataset.slots(number, micro)]
        for lane in sorted({plan.place(slot, 0)[0] for slot in slots}):
            now = plan.segment_shards(lane, position)
            yield now, plan.segment_shards(lane, now[1])

    def close(self) -> None:
        """Ask for nothing more and cancel what is under way; the bytes that arrived are kept for the next time."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
