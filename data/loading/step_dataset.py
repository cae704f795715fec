"""A dataset opened and laid out in order, and the map from (dataset, step, micro-batch) to a batch."""

from __future__ import annotations

import dataclasses
import hashlib
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, Sampler, get_worker_info

from data.batches.batch import Batch
from data.batches.collate import Collate
from data.dataset import Corpus, DatasetSpec, open_corpus, reader_of
from data.errors import BadSample, ContentError, PassedOver
from data.loading.heartbeat import Board
from data.order import SAMPLE, Plan, Slot, dataset_seed, stream
from flamingo.errors import UserError

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
    def open(cls, spec: DatasetSpec, seed: int, rank: int = 0, world: int = 1) -> Source:
        """Open the shards. Raises UserError for a missing, truncated or changed one."""
        corpus = open_corpus(spec, rank, world)
        plan = Plan(corpus.counts, dataset_seed(seed, spec.name), spec.batch_size, spec.lanes, spec.block)
        return cls(spec, corpus, plan)

    def lane_position(self, step: int) -> int:
        """Samples that each lane has given before this step."""
        return self.origin + step * self.plan.per_lane

    def fingerprint(self, seed: int) -> dict[str, Any]:
        """What the order depends on. Two runs with equal fingerprints have the same order of samples."""
        shards = self.corpus.shards
        digest = hashlib.sha256("".join(shard.digest for shard in shards).encode()).hexdigest()[:16]
        sizes = {"shards": len(shards), "samples": self.plan.total, "shards_sha256": digest, "kind": self.spec.kind}
        return {"seed": seed, "lanes": self.plan.lanes, "block": self.plan.block} | sizes

    def slots(self, step: int) -> list[Slot]:
        """The samples of the global batch of a step, before any replacement."""
        plan = dataclasses.replace(self.plan)  # its own memory: a thread may be reading ahead with the other
        start = self.lane_position(step)
        return [plan.at(*plan.place(slot, start)) for slot in range(self.spec.batch_size)]


def most_open_files(wanted: int = 1 << 14) -> int:
    """How many files this process (and the workers it forks) may have open, after asking for `wanted`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reach = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= reach:
        return reach
    resource.setrlimit(resource.RLIMIT_NOFILE, (reach, hard))
    return reach


@dataclass(slots=True)
class Failure:
    """A UserError on its way out of a worker: as an exception it would arrive wrapped in the worker's traceback."""

    message: str


class StepDataset(Dataset[Batch | Failure]):
    """Map-style: (dataset, step, micro-batch) to that batch of this rank. Holds no state that matters."""

    def __init__(
        self,
        sources: Sequence[Source],
        collate: dict[str, Collate],
        rank: int,
        world: int,
        micro: int,
        board: Board | None = None,
    ) -> None:
        self.sources, self.collate = sources, collate
        self.rank, self.world, self.micro = rank, world, micro
        self.readers = [reader_of(source.spec, source.corpus) for source in sources]
        self.board = board or Board(1)
        each = most_open_files() // (4 * len(sources))  # a tar and its index are a file each; half is left to others
        for source, reader in zip(sources, self.readers, strict=True):
            reader.max_open = min(reader.max_open, each)
            source.corpus.indexes.mapped = min(source.corpus.indexes.mapped, each)

    def slots(self, number: int, micro: int) -> range:
        """The slots of a dataset's global batch that make up this rank's micro-batch."""
        size = self.sources[number].spec.batch_size // (self.world * self.micro)
        first = (self.rank * self.micro + micro) * size
        return range(first, first + size)

    def __getitem__(self, place: Place) -> Batch | Failure:
        try:
            return self._batch(place)
        except UserError as error:
            return Failure(str(error))

    def _batch(self, place: Place) -> Batch:
        number, step, micro = place
        source, retry = self.sources[number], self.readers[number].retry
        batch = Batch(source.spec.name, {}, [])
        samples = []
        info = get_worker_info()
        worker = 0 if info is None else info.id
        repeats = retry.repeats
        for slot in self.slots(number, micro):
            lane, n = source.plan.place(slot, source.lane_position(step))
            samples.append(self._sample(number, step, lane, n, batch, worker))
        batch.tensors = self.collate[source.spec.name].batch(source.spec, samples)
        batch.retries = retry.repeats - repeats
        self.board.clear(worker)
        return batch

    def _sample(self, number: int, step: int, lane: int, n: int, batch: Batch, worker: int) -> Any:
        """Sample n of a lane, or, when it is bad or passed over, what stands in for it; bad ones are noted."""
        source = self.sources[number]
        collate = self.collate[source.spec.name]
        for attempt in range(ATTEMPTS + 1):
            at = source.plan.replacement(lane, n, attempt) if attempt else source.plan.at(lane, n)
            self.board.write(worker, number, step, at.shard, at.row)
            row = source.corpus.row(at.shard, at.row)
            # The last one is not passed over: where every document has a single image there is none that stands in.
            spec = source.spec if attempt < ATTEMPTS else dataclasses.replace(source.spec, single_image_share=1.0)
            try:
                raw = self.readers[number].sample(at.shard, row, images=spec.kind != "text")
                random = stream(source.plan.seed, SAMPLE, at.epoch, at.shard, row)
                sample = collate.sample(spec, raw, random)
            except PassedOver:
                continue
            except ContentError as error:
                index = source.corpus.indexes[at.shard]
                bad = BadSample(source.spec.name, error.reason, index.path, index.key(row), error.detail)
                batch.bad.append(bad)
                continue
            batch.keys.append(raw.key)
            return sample
        raise UserError(
            f"dataset {source.spec.name!r}: a sample and its {ATTEMPTS} replacements were all bad, the last one key "
            f"{bad.key!r} of {bad.shard}: {bad.reason}, {bad.detail}; find them with: python -m data verify"
        )

    def name(self, dataset: int, shard: int, row: int) -> str:
        """A sample in words."""
        source = self.sources[dataset]
        return f"dataset {source.spec.name!r}, shard {source.corpus.shards[shard].path}, sample {row}"


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
