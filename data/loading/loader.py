"""Batches for a training step from a mixture of datasets, and a state of a few integers.

Every step has one batch of every dataset (the paper's accumulation: gradients of all datasets, then one update), each
cut into the micro-batches of this rank. One pool of workers serves all datasets. What is notable: a batch depends on
its step alone (data.order), so the same global batches come out for every world size and every number of workers, and
to resume is to start at another step: nothing is replayed, no worker has state. Steps are counted when they are
delivered; what workers have read ahead is simply read again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from data.batches.batch import Batch, StepBatches
from data.batches.collate import Collate
from data.dataset import DatasetSpec
from data.errors import BadSampleCounter, BadSampleLog
from data.loading.heartbeat import Board, warn
from data.loading.prefetch import Prefetcher
from data.loading.shared_memory import in_slabs
from data.loading.step_dataset import Failure, Source, StepDataset, StepSampler
from data.loading.workers import Ahead, InTurn, Supply, WorkerLostError, Workers
from flamingo.errors import UserError

__all__ = ["Batch", "MixLoader", "StepBatches"]
STATE_VERSION = 1


class MixLoader:
    """Iterate to get a `StepBatches` for every step, from the step after the last one delivered, without end.

    `collate` serves all datasets, or is a dictionary by dataset name. `rank` and `world_size` are those of the data
    parallel group (they are never read from the environment). With `num_workers=0` batches are made in this process, by
    a thread that is `prefetch_factor` steps ahead (0: when they are asked for). `bad_samples` is a file that gets a
    JSON line for every replaced sample. When no batch comes for `patience` seconds a line on stderr names rank, worker
    and shard; after `give_up` seconds the run stops with it.

    Raises UserError before the first batch for shards that are missing, truncated or changed, and for batch sizes that
    cannot be divided; later for reads that keep failing, too many bad samples, and a worker that hangs or is killed.
    """

    def __init__(
        self,
        specs: Sequence[DatasetSpec],
        collate: Collate | dict[str, Collate],
        *,
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
        patience: float = 60.0,
        give_up: float = 1800.0,
    ) -> None:
        names = [spec.name for spec in specs]
        if not names or len(set(names)) < len(names):
            raise UserError(f"the mixture needs datasets with different names, it has {names or 'none'}")
        for spec in specs:
            if spec.batch_size % (world_size * micro_batches):
                raise UserError(
                    f"dataset {spec.name!r}: batch_size={spec.batch_size} cannot be divided among {world_size} "
                    f"processes x {micro_batches} micro-batches; use a multiple of {world_size * micro_batches}"
                )
        by_name = collate if isinstance(collate, dict) else dict.fromkeys(names, collate)
        for spec in specs:
            if spec.pack and not getattr(by_name[spec.name], "can_pack", False):
                raise UserError(f"dataset {spec.name!r}: pack={spec.pack} is for rows of Flamingo only; use pack=0")
        self.seed, self.step = seed, start_step
        self.sources = [Source.open(spec, seed, rank, world_size) for spec in specs]
        self.dataset = StepDataset(self.sources, by_name, rank, world_size, micro_batches, Board(num_workers))
        self.num_workers, self.prefetch_factor, self.pin_memory = num_workers, prefetch_factor, pin_memory
        self.patience, self.give_up = patience, give_up
        self.bad = BadSampleCounter(max_bad_rate)
        self.log = BadSampleLog(Path(bad_samples), rank) if bad_samples is not None else None

    def __iter__(self) -> Iterator[StepBatches]:
        micro = self.dataset.micro
        if self.log is not None:
            self.log.start(self.step)
        with closing(self._supply()) as supply, closing(Prefetcher(self.dataset)) as prefetcher:
            while True:
                step = self.step
                prefetcher.advance(step)
                batches = {
                    source.spec.name: [self._checked(self._taken(supply)) for _ in range(micro)]
                    for source in self.sources
                }
                if self.log is not None:
                    self.log.write(step, (bad for pieces in batches.values() for piece in pieces for bad in piece.bad))
                self.step = step + 1
                yield StepBatches(step, batches)

    def _supply(self) -> Supply:
        sampler = StepSampler(self.step, len(self.sources), self.dataset.micro)
        if self.num_workers:
            ahead, batches = self.num_workers * max(1, self.prefetch_factor), len(self.sources) * self.dataset.micro
            dataset = in_slabs(self.dataset, ahead + 2 * batches + 1)  # read ahead, of this step, and of the last one
            return Workers(dataset, sampler, self.num_workers, self.prefetch_factor, self.pin_memory, self.patience)
        if self.prefetch_factor:
            depth = self.prefetch_factor * len(self.sources) * self.dataset.micro
            return Ahead(self.dataset.__getitem__, iter(sampler), depth, self.patience)
        return InTurn(self.dataset.__getitem__, iter(sampler))

    def _taken(self, supply: Supply) -> Batch | Failure:
        """The next batch; says what is waited for, and at last gives up."""
        begun = time.monotonic()
        while True:
            try:
                return supply.take()
            except TimeoutError:
                waited = time.monotonic() - begun
                report = (
                    f"no batch for {waited:.0f} s; {self.dataset.board.report(self.dataset.rank, self.dataset.name)}"
                )
                if waited >= self.give_up:
                    raise UserError(f"{report}; the run stops (limit {self.give_up:.0f} s)") from None
                warn(report)
            except WorkerLostError as error:
                report = self.dataset.board.report(self.dataset.rank, self.dataset.name)
                raise UserError(
                    f"a loader process ended: {str(error).split(' This might be')[0]}; {report}; if memory ran out use "
                    "fewer workers, else look at that sample: python -m data verify"
                ) from None

    def _checked(self, item: Batch | Failure) -> Batch:
        if isinstance(item, Failure):
            raise UserError(item.message)
        self.bad.add(len(item.keys), item.bad)
        return item

    def state_dict(self) -> dict[str, Any]:
        """The place in the order after the steps delivered so far, the same on every rank, and what it depends on."""
        return {
            "v": STATE_VERSION,
            "step": self.step,
            "datasets": {s.spec.name: {"lane_position": s.lane_position(self.step)} for s in self.sources},
            "plan": {s.spec.name: s.fingerprint(self.seed) for s in self.sources},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken, on any world size and number of workers.

        Batch sizes may differ, as long as the lanes are the same: no sample is lost or repeated. Raises UserError,
        naming what differs, when the order is another one (other shards, seed, lanes or block).
        """
        if state.get("v") != STATE_VERSION:
            raise UserError(f"loader state has version {state.get('v')!r}, this program reads {STATE_VERSION}")
        mine = {source.spec.name: source.fingerprint(self.seed) for source in self.sources}
        if mine.keys() != state["plan"].keys():
            raise UserError(f"the state is of datasets {sorted(state['plan'])}, this mixture has {sorted(mine)}")
        for name, plan in mine.items():
            saved = state["plan"][name]
            changed = [f"{k} {saved.get(k)!r} -> {v!r}" for k, v in plan.items() if saved.get(k) != v]
            if changed:
                raise UserError(
                    f"dataset {name!r} is not the one of the saved state ({'; '.join(changed)}); resume with the same "
                    "data and seed, or start the data anew"
                )
        self.step = int(state["step"])
        for source in self.sources:
            given = int(state["datasets"][source.spec.name]["lane_position"])
            source.origin = given - self.step * source.plan.per_lane

    def explain(self, step: int) -> list[tuple[str, str, str]]:
        """(dataset, shard, key) of the global batch of a step, all ranks, before any replacement of bad samples."""
        found = []
        for source in self.sources:
            for at in source.slots(step):
                index = source.corpus.indexes[at.shard]
                found.append((source.spec.name, index.path, index.key(source.corpus.row(at.shard, at.row))))
        return found
