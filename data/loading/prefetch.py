"""Fetches remote shards before they are needed: the order is known, so nothing is guessed.

For each lane of this rank the shards that its samples are now drawn from come first, then those of the lane's next
block, as far as the cache's limit goes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from data.loading.step_dataset import Source, StepDataset
from data.remote.download import is_remote
from data.remote.shard_cache import ShardCache
from flamingo.errors import UserError

AT_ONCE = 4


class Prefetcher:
    """Threads that fill the caches of a rank's datasets; none when no shard is remote.

    Raises UserError when a cache cannot even hold what the lanes are reading now: every shard would be fetched again
    and again.
    """

    def __init__(self, dataset: StepDataset) -> None:
        self.dataset = dataset
        self._plans = [replace(source.plan) for source in dataset.sources]
        self._remote = [n for n, source in enumerate(dataset.sources) if source.corpus.cache is not None]
        self._pool: ThreadPoolExecutor | None = None
        self._known: set[tuple[int, int]] = set()  # (dataset, first sample of a block) of what was asked for last
        self._under_way: dict[str, Future[str]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def advance(self, step: int) -> None:
        """Training is at this step: ask for what comes."""
        if not self._remote:
            return
        if self._pool is None:  # not before the worker processes were forked
            self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="shards ahead")
        for number in self._remote:
            self._ask(number, step)

    def _ask(self, number: int, step: int) -> None:
        source = self.dataset.sources[number]
        cache = source.corpus.cache
        assert cache is not None
        assert self._pool is not None
        now, later = ([*blocks] for blocks in zip(*self._blocks(number, source, step), strict=True))
        asked = {(number, first) for _, first in now}
        if asked <= self._known:
            return
        self._known = {known for known in self._known if known[0] != number} | asked
        needed = _bytes(source, [shard for shards, _ in now for shard in shards])
        if needed > cache.limit:
            raise UserError(
                f"dataset {source.spec.name!r}: this rank draws from {needed} bytes of shards at a time and the cache "
                f"{cache.folder} may hold {cache.limit}; raise cache_gb or lower block={source.spec.block}"
            )
        wanted = list(dict.fromkeys(shard for shards, _ in [*now, *later] for shard in shards))
        room = cache.limit
        for shard in wanted:
            path = source.corpus.shards[shard].path
            room -= source.corpus.shards[shard].tar_size
            if not is_remote(path) or room < 0:
                continue
            with self._lock:
                if not cache.has(path) and path not in self._under_way:
                    self._under_way[path] = self._pool.submit(self._fetch, cache, path)

    def _fetch(self, cache: ShardCache, path: str) -> str:
        try:
            with suppress(UserError):  # whoever reads the shard meets it again, and says so
                return cache.local(path, wanted=lambda: not self._closed)
            return ""
        finally:
            with self._lock:
                self._under_way.pop(path, None)

    def _blocks(
        self, number: int, source: Source, step: int
    ) -> Iterator[tuple[tuple[list[int], int], tuple[list[int], int]]]:
        """For each lane of this rank (shards, first sample of the block after) of its block now and of the next."""
        plan, position = self._plans[number], source.lane_position(step)
        slots = [slot for micro in range(self.dataset.micro) for slot in self.dataset.slots(number, micro)]
        for lane in sorted({plan.place(slot, 0)[0] for slot in slots}):
            now = plan.segment_shards(lane, position)
            yield now, plan.segment_shards(lane, now[1])

    def close(self) -> None:
        """Ask for nothing more, and let go of what is under way: what has come of it is kept for the next time."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _bytes(source: Source, shards: list[int]) -> int:
    return sum(source.corpus.shards[shard].tar_size for shard in set(shards))
