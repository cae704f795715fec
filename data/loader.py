"""Batches for a training step from a mixture of datasets, and a state of a few integers.

Every step has one batch of every dataset (the paper's accumulation: gradients of all datasets, then one update), each
cut into the micro-batches of this rank. One pool of workers serves all datasets. What is notable: a batch depends on
its step alone (data.plan), so the same global batches come out for every world size and every number of workers, and
to resume is to start at another step: nothing is replayed, no worker has state. Steps are counted when they are
delivered; what workers have read ahead is simply read again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.batch import Batch, StepBatches
from data.collate import Collate
from data.errors import BadSample, BadSampleCounter, ContentError
from data.plan import SAMPLE, Plan, Slot, dataset_seed, stream
from data.reader import ShardReader
from data.spec import Corpus, DatasetSpec, open_corpus
from flamingo.errors import UserError

STATE_VERSION = 1
ATTEMPTS = 8  # replacements tried for a bad sample
Place = tuple[int, int, int]  # dataset, step, micro-batch


@dataclass(slots=True)
class Source:
    """A dataset with its shards opened and its order laid out; `origin` is the lane position of step 0."""

    spec: DatasetSpec
    corpus: Corpus
    plan: Plan
    origin: int = 0

    @classmethod
    def open(cls, spec: DatasetSpec, seed: int) -> Source:
        """Open the shards. Raises UserError for a missing, truncated or changed one."""
        corpus = open_corpus(spec)
        plan = Plan(corpus.counts, dataset_seed(seed, spec.name), spec.batch_size, spec.lanes, spec.block)
        return cls(spec, corpus, plan)

    def lane_position(self, step: int) -> int:
        """Samples that each lane has given before this step."""
        return self.origin + step * self.plan.per_lane

    def fingerprint(self, seed: int) -> dict[str, Any]:
        """What the order depends on. Two runs with equal fingerprints have the same order of samples."""
        indexes = self.corpus.indexes
        digest = hashlib.sha256("".join(index.digest for index in indexes).encode()).hexdigest()[:16]
        sizes = {"shards": len(indexes), "samples": self.plan.total, "shards_sha256": digest, "kind": self.spec.kind}
        return {"seed": seed, "lanes": self.plan.lanes, "block": self.plan.block} | sizes


@dataclass(slots=True)
class Failure:
    """A UserError on its way out of a worker: as an exception it would arrive wrapped in the worker's traceback."""

    message: str


class StepDataset(Dataset[Batch | Failure]):
    """Map-style: (dataset, step, micro-batch) to that batch of this rank. Holds no state that matters."""

    def __init__(
        self, sources: Sequence[Source], collate: dict[str, Collate], rank: int, world: int, micro: int
    ) -> None:
        self.sources, self.collate = sources, collate
        self.rank, self.world, self.micro = rank, world, micro
        self.readers = [ShardReader(source.corpus.indexes) for source in sources]

    def slots(self, place: Place) -> range:
        """The slots of the global batch that make up this rank's micro-batch."""
        size = self.sources[place[0]].spec.batch_size // (self.world * self.micro)
        first = (self.rank * self.micro + place[2]) * size
        return range(first, first + size)

    def __getitem__(self, place: Place) -> Batch | Failure:
        try:
            return self._batch(place)
        except UserError as error:
            return Failure(str(error))

    def _batch(self, place: Place) -> Batch:
        source = self.sources[place[0]]
        batch = Batch(source.spec.name, {}, [])
        samples = []
        for slot in self.slots(place):
            lane, n = source.plan.place(slot, source.lane_position(place[1]))
            samples.append(self._sample(place[0], lane, n, batch))
        batch.tensors = self.collate[source.spec.name].batch(source.spec, samples)
        return batch

    def _sample(self, number: int, lane: int, n: int, batch: Batch) -> Any:
        """Sample n of a lane, or, when its content is bad, what stands in for it; both are noted in the batch."""
        source = self.sources[number]
        for attempt in range(ATTEMPTS + 1):
            at = source.plan.replacement(lane, n, attempt) if attempt else source.plan.at(lane, n)
            row = source.corpus.row(at.shard, at.row)
            index = source.corpus.indexes[at.shard]
            try:
                raw = self.readers[number].sample(at.shard, row)
                random = stream(source.plan.seed, SAMPLE, at.epoch, at.shard, row)
                sample = self.collate[source.spec.name].sample(source.spec, raw, random)
            except ContentError as error:
                bad = BadSample(source.spec.name, error.reason, index.path, index.key(row), error.detail)
                batch.bad.append(bad)
                continue
            batch.keys.append(raw.key)
            return sample
        raise UserError(
            f"dataset {source.spec.name!r}: a sample and its {ATTEMPTS} replacements were all bad, the last one key "
            f"{bad.key!r} of {bad.shard}: {bad.reason}, {bad.detail}; find them with: python -m data verify"
        )


class StepSampler(Sampler[Place]):
    """The places of all batches from a step on, without end: step by step, dataset by dataset."""

    def __init__(self, start: int, datasets: int, micro: int) -> None:
        self.start, self.datasets, self.micro = start, datasets, micro

    def __iter__(self) -> Iterator[Place]:
        step = self.start
        while True:
            for dataset in range(self.datasets):
                yield from ((dataset, step, micro) for micro in range(self.micro))
            step += 1


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


class MixLoader:
    """Iterate to get a `StepBatches` for every step, from the step after the last one delivered, without end.

    `collate` serves all datasets, or is a dictionary by dataset name. `rank` and `world_size` are those of the data
    parallel group (they are never read from the environment). With `num_workers=0` batches are made in this process.
    Raises UserError before the first batch for shards that are missing, truncated or changed, and for batch sizes that
    cannot be divided.
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
        self.seed, self.step = seed, start_step
        self.sources = [Source.open(spec, seed) for spec in specs]
        by_name = collate if isinstance(collate, dict) else dict.fromkeys(names, collate)
        self.dataset = StepDataset(self.sources, by_name, rank, world_size, micro_batches)
        self.num_workers, self.prefetch_factor, self.pin_memory = num_workers, prefetch_factor, pin_memory
        self.bad = BadSampleCounter(max_bad_rate)

    def __iter__(self) -> Iterator[StepBatches]:
        micro = self.dataset.micro
        arriving = iter(
            DataLoader(
                self.dataset,
                batch_size=None,
                sampler=StepSampler(self.step, len(self.sources), micro),
                num_workers=self.num_workers,
                worker_init_fn=_one_thread,
                prefetch_factor=self.prefetch_factor if self.num_workers else None,
                pin_memory=self.pin_memory,
                collate_fn=_as_it_is,
                generator=torch.Generator(),  # or it would draw from the global one
            )
        )
        try:
            while True:
                step = self.step
                batches = {
                    source.spec.name: [self._checked(next(arriving)) for _ in range(micro)] for source in self.sources
                }
                self.step = step + 1
                yield StepBatches(step, batches)
        finally:
            del arriving  # ends the workers now, not when the last traceback that knows them is collected

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
            for at in self.slots(source, step):
                index = source.corpus.indexes[at.shard]
                found.append((source.spec.name, index.path, index.key(source.corpus.row(at.shard, at.row))))
        return found

    @staticmethod
    def slots(source: Source, step: int) -> list[Slot]:
        """The samples of the global batch of a step in one dataset."""
        start = source.lane_position(step)
        return [source.plan.at(*source.plan.place(slot, start)) for slot in range(source.spec.batch_size)]


def _as_it_is(item: Any) -> Any:
    return item
