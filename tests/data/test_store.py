"""A dataset that is not tars: a list in memory gives what the same documents give as shards, and mixes with shards."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from data.batches.collate import FlamingoCollate
from data.batches.packing import groups
from data.dataset import DatasetSpec
from data.loading.loader import MixLoader, StepBatches
from data.shards.document import Document, Image, Text
from data.shards.reader import RawSample, raw_sample
from data.shards.writer import ShardWriter
from data.store import MemoryStore
from flamingo.errors import UserError
from tests.data.helpers import byte_processor, numbered_document, same, write_documents

COLLATE = FlamingoCollate(byte_processor())
DOCUMENTS = [numbered_document(3 * n, 1 + n % 4, f"d-{n:03d}", words=1 + n % 5) for n in range(41)]
RANDOM: dict[str, Any] = {"max_tokens": 14, "max_images": 2, "next_image_probability": 0.5, "flip": True, "colour": 0.2}


def memory(**options: Any) -> DatasetSpec:
    values: dict[str, Any] = {"name": "mine", "batch_size": 8}
    return DatasetSpec(**(values | RANDOM | options))


def written(folder: Path, per_shard: int = 1000) -> str:
    """The same documents as shards; one shard is one part, as the list is."""
    with ShardWriter(folder, "documents", per_shard) as writer:
        for document in DOCUMENTS:
            writer.write(document)
    return str(folder)


def take(loader: MixLoader, steps: int) -> list[StepBatches]:
    return list(itertools.islice(loader, steps))


def in_memory(spec: DatasetSpec, **options: Any) -> MixLoader:
    return MixLoader([spec], COLLATE, stores={"mine": MemoryStore(DOCUMENTS)}, **options)


def assert_equal(mine: list[StepBatches], other: list[StepBatches]) -> None:
    """The same steps of the same datasets, to the byte."""
    for a, b in zip(mine, other, strict=True):
        assert a.step == b.step
        assert a.batches.keys() == b.batches.keys()
        for name in a.batches:
            for x, y in zip(a.batches[name], b.batches[name], strict=True):
                assert x.keys == y.keys
                assert same(x.tensors, y.tensors)


@pytest.mark.parametrize("options", [{}, {"pack": 40}, {"kind": "text", "lanes": 4}, {"crop": "start", "pack": 64}])
def test_it_equals_the_same_documents_as_shards_to_the_byte(tmp_path: Path, options: dict[str, Any]) -> None:
    spec = memory(**options)
    shards = dataclasses.replace(spec, shards=[written(tmp_path)])
    steps = take(in_memory(spec, seed=3), 12)  # more than two epochs
    assert_equal(steps, take(MixLoader([shards], COLLATE, seed=3), 12))
    if spec.pack:
        rows = [len(batch.tensors["input_ids"]) for step in steps for batch in step.batches["mine"]]
        assert max(rows) < spec.batch_size
        assert groups([1, 1], spec.pack) == [[0, 1]]


def test_every_document_once_an_epoch_and_in_another_order_in_the_next() -> None:
    loader = in_memory(memory(batch_size=41, lanes=1))
    epochs = [step.batches["mine"][0].keys for step in take(loader, 2)]
    assert [sorted(keys) for keys in epochs] == [[document.key for document in DOCUMENTS]] * 2
    assert epochs[0] != epochs[1]
    assert [key for *_, key in loader.explain(0)] == epochs[0]
    assert {shard for _, shard, _ in loader.explain(1)} == {"memory"}


def test_it_resumes_and_refuses_another_list(tmp_path: Path) -> None:
    whole = take(in_memory(memory()), 9)
    first = in_memory(memory())
    begun = take(first, 4)
    state = json.loads(json.dumps(first.state_dict()))
    second = in_memory(memory())
    second.load_state_dict(state)
    assert_equal(begun + take(second, 5), whole)
    changed = [*DOCUMENTS[:-1], dataclasses.replace(DOCUMENTS[-1], nodes=[Text("another text")])]
    for documents, message in ((changed, "documents_sha256"), (DOCUMENTS[1:], "samples 41 -> 40")):
        other = MixLoader([memory()], COLLATE, stores={"mine": MemoryStore(documents)})
        with pytest.raises(UserError, match=rf"dataset 'mine' differs from the saved state \(.*{message}"):
            other.load_state_dict(state)
    shards = MixLoader([memory(shards=[written(tmp_path)])], COLLATE)
    with pytest.raises(UserError, match="differs from the saved state"):
        shards.load_state_dict(state)


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # three workers on two cores
def test_workers_give_the_same_batches_and_it_mixes_with_tars(tmp_path: Path, workers: int) -> None:
    tars = DatasetSpec(name="tars", shards=[str(write_documents(tmp_path))], batch_size=4, **RANDOM)
    specs, stores = [tars, memory(pack=40)], {"mine": MemoryStore(DOCUMENTS)}
    expected = take(MixLoader(specs, COLLATE, stores=stores, prefetch_factor=0), 4)
    assert_equal(take(MixLoader(specs, COLLATE, stores=stores, num_workers=workers), 4), expected)
    alone = take(MixLoader([tars], COLLATE), 4)
    for step, other in zip(expected, alone, strict=True):
        assert same(step.batches["tars"][0].tensors, other.batches["tars"][0].tensors)


def test_ranks_share_the_global_batch() -> None:
    whole = [step.batches["mine"][0].keys for step in take(in_memory(memory()), 6)]
    ranks = [take(in_memory(memory(), rank=rank, world_size=2, micro_batches=2), 6) for rank in range(2)]
    for number, keys in enumerate(whole):
        assert [key for rank in ranks for batch in rank[number].batches["mine"] for key in batch.keys] == keys


def test_a_bad_image_in_it_is_replaced_and_named() -> None:
    documents = [numbered_document(n, 1) for n in range(20)]
    documents[7].images[0] = b"not an image"
    spec = memory(batch_size=20, lanes=1)
    loader = MixLoader([spec], COLLATE, stores={"mine": MemoryStore(documents)})
    take(loader, 1)
    assert {(bad.shard, bad.key, bad.reason) for bad in loader.bad.by_sample} == {
        ("memory", "00000007", "not an image")
    }
    half = MixLoader([spec], COLLATE, stores={"mine": MemoryStore([Document("k", [Text("\ud800")], [])])})
    with pytest.raises(UserError, match=r"replacements were all bad.*text is not Unicode"):
        take(half, 1)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"document 0 \(key 'k'\): its nodes name image 1 but it has 0 images"):
        MemoryStore([Document("k", [Image((1,))], [])])
    with pytest.raises(UserError, match=r"stores are given for \['other'\], the mixture has the datasets \['mine'\]"):
        MixLoader([memory()], COLLATE, stores={"other": MemoryStore(DOCUMENTS)})
    with pytest.raises(UserError, match="dataset 'mine' has no samples"):
        MixLoader([memory()], COLLATE, stores={"mine": MemoryStore([])})


class TwoParts:
    """A store of one's own: the documents in parts of different length."""

    def __init__(self, parts: list[list[Document]]) -> None:
        self.parts = parts

    def lengths(self) -> list[int]:
        return [len(part) for part in self.parts]

    def key(self, part: int, row: int) -> tuple[str, str]:
        return f"part {part}", self.parts[part][row].key

    def read(self, part: int, row: int, *, images: bool = True) -> RawSample:
        return raw_sample(self.parts[part][row], self.parts[part][row].key)

    def fingerprint(self) -> dict[str, Any]:
        return {"lengths": self.lengths()}


def test_a_store_in_parts_equals_as_many_shards(tmp_path: Path) -> None:
    store = TwoParts([DOCUMENTS[first : first + 9] for first in range(0, 41, 9)])
    spec = memory(block=2)
    shards = dataclasses.replace(spec, shards=[written(tmp_path, 9)])
    mine = MixLoader([spec], COLLATE, stores={"mine": store})
    assert_equal(take(mine, 12), take(MixLoader([shards], COLLATE), 12))
    assert mine.state_dict()["plan"]["mine"]["lengths"] == [9, 9, 9, 9, 5]


def test_the_example_of_the_docs_runs() -> None:
    docs = (Path(__file__).resolve().parents[2] / "docs" / "shards.md").read_text()
    section = docs.split("## Samples that are not in shards\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    space: dict[str, Any] = {"processor": byte_processor(), "png": numbered_document(0, 1).images[0]}
    exec(compile(example, "docs/shards.md", "exec"), space)
    assert space["step"].batches["mine"][0].stats["rows"] == 4
