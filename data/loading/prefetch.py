"""Fetches remote shards before they are needed: the order is known, so nothing is guessed.

For each lane of this rank, first the shards that its samples are drawn from now, then those of its next block, as far
as the capacity of the cache goes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from data.loading.step_dataset import OpenDataset, StepDataset
from data.remote.download import is_remote
from data.remote.shard_cache import ShardCache
from data.shard_store import ShardStore
from flamingo.errors import UserError

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
        needed = sum(store.shards[shard].tar_size for shard in {shard for shards, _ in now for shard in shards})
        if needed > cache.limit:
            raise UserError(
                f"dataset {spec.name!r}: this rank draws from {needed} bytes of shards at a time and the cache "
                f"{cache.folder} may hold {cache.limit}; raise cache_gb or lower block={spec.block}"
            )
        wanted = list(dict.fromkeys(shard for shards, _ in [*now, *later] for shard in shards))
        room = cache.limit
        for shard in wanted:
            path = store.shards[shard].path
            room -= store.shards[shard].tar_size
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
