"""The loader: equal batches for every layout, a state of integers, faults named or counted."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from data.batches.collate import FlamingoCollate
from data.dataset import DatasetSpec, resolve_shards
from data.errors import BadSample, BadSampleCounter
from data.loading.loader import MixLoader, StepBatches
from data.shards.writer import ShardWriter
from flamingo.errors import UserError
from tests.data.helpers import byte_processor, numbered_document, same, write_documents
from tests.data.test_index import make_tar

COLLATE = FlamingoCollate(byte_processor())


def mixture(folder: Path) -> list[DatasetSpec]:
    """Two datasets; windows, next-image and flips all drawn at random."""
    if not folder.exists():
        write_documents(folder / "a", count=37, per_shard=5, images=3)
        write_documents(folder / "b", count=11, per_shard=3, images=1)
    common: dict[str, Any] = {"max_tokens": 14, "max_images": 2, "next_image_probability": 0.5, "flip": True}
    return [
        DatasetSpec(name="a", shards=[str(folder / "a")], batch_size=16, block=2, **common),
        DatasetSpec(name="b", shards=[str(folder / "b")], batch_size=8, **common),
    ]


def take(loader: MixLoader, steps: int) -> list[StepBatches]:
    return list(itertools.islice(loader, steps))


def one(folder: Path, **options: Any) -> DatasetSpec:
    values: dict[str, Any] = {"name": "d", "shards": [str(folder)], "batch_size": 4}
    return DatasetSpec(**(values | options))


def rows_of(steps: list[StepBatches]) -> list[dict[str, list[tuple[Any, ...]]]]:
    """Every row's key and bytes, without the padding that its batch mates cause."""
    found = []
    for step in steps:
        by_name: dict[str, list[tuple[Any, ...]]] = {}
        for name, batches in step.batches.items():
            rows = by_name.setdefault(name, [])
            for batch in batches:
                t = batch.tensors
                first = 0
                for row, key in enumerate(batch.keys):
                    length, count = int(t["attention_mask"][row].sum()), int(t["image_counts"][row])
                    texts = [tuple(t[part][row, :length].tolist()) for part in ("input_ids", "phi", "labels")]
                    rows.append((key, *texts, t["pixel_values"][first : first + count].numpy().tobytes()))
                    first += count
        found.append(by_name)
    return found


def joined(ranks: list[list[dict[str, list[Any]]]]) -> list[dict[str, list[Any]]]:
    """The global batches, from every rank's."""
    steps = zip(*ranks, strict=True)
    return [{name: [row for rank in step for row in rank[name]] for name in step[0]} for step in steps]


LAYOUTS = [(1, 0, 1), (1, 0, 4), (2, 0, 1), (4, 0, 2), (8, 0, 1)]
WITH_WORKERS = [(1, 2, 1), (2, 2, 2), (4, 1, 1), (8, 3, 1)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # three workers on two cores
@pytest.mark.parametrize(
    ("world", "workers", "micro"),
    [*LAYOUTS[1:], *(pytest.param(*layout, marks=pytest.mark.slow) for layout in WITH_WORKERS)],
)
def test_global_batches_are_equal_for_every_layout(tmp_path: Path, world: int, workers: int, micro: int) -> None:
    specs, steps = mixture(tmp_path / "m"), 6
    expected = rows_of(take(MixLoader(specs, COLLATE, seed=5), steps))
    options: dict[str, Any] = {"world_size": world, "num_workers": workers, "micro_batches": micro, "seed": 5}
    ranks = [rows_of(take(MixLoader(specs, COLLATE, rank=rank, **options), steps)) for rank in range(world)]
    assert joined(ranks) == expected


def test_one_worker_gives_the_same_tensors(tmp_path: Path) -> None:
    specs = mixture(tmp_path / "m")
    here, there = (take(MixLoader(specs, COLLATE, num_workers=workers), 3) for workers in (0, 1))
    for mine, other in zip(here, there, strict=True):
        for name in ("a", "b"):
            assert same(mine.batches[name][0].tensors, other.batches[name][0].tensors)


def test_batches_have_the_order_that_explain_gives(tmp_path: Path) -> None:
    loader = MixLoader(mixture(tmp_path / "m"), COLLATE)
    for step in take(loader, 4):
        explained = loader.explain(step.step)
        for name in ("a", "b"):
            assert [key for dataset, _, key in explained if dataset == name] == step.batches[name][0].keys
    assert all(Path(shard).exists() for _, shard, _ in loader.explain(10**6))


def test_every_sample_once_an_epoch(tmp_path: Path) -> None:
    folder = write_documents(tmp_path, count=48, per_shard=7)
    loader = MixLoader([one(folder, batch_size=16)], COLLATE)
    for _ in range(3):
        keys = Counter(key for step in take(loader, 3) for key in step.batches["d"][0].keys)
        assert len(keys) == 48
        assert set(keys.values()) == {1}


def test_nothing_global_is_drawn_from_or_looked_at(tmp_path: Path) -> None:
    specs = mixture(tmp_path / "m")
    expected = rows_of(take(MixLoader(specs, COLLATE), 2))
    torch.manual_seed(123)
    random.seed(4)
    before = torch.get_rng_state()
    assert rows_of(take(MixLoader(specs, COLLATE), 2)) == expected
    assert torch.equal(torch.get_rng_state(), before)
    assert rows_of(take(MixLoader(specs, COLLATE, seed=1), 2)) != expected


def test_a_dataset_more_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    specs = mixture(tmp_path / "m")
    both = rows_of(take(MixLoader(specs, COLLATE), 3))
    alone = rows_of(take(MixLoader(specs[1:], COLLATE), 3))
    assert [step["b"] for step in both] == [step["b"] for step in alone]


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    specs = mixture(tmp_path / "m")
    whole = rows_of(take(MixLoader(specs, COLLATE, seed=2), 9))
    first = MixLoader(specs, COLLATE, seed=2, num_workers=1)
    begun = rows_of(take(first, 4))
    state = json.loads(json.dumps(first.state_dict()))
    assert state["step"] == 4
    assert len(json.dumps(state)) < 2000
    options: dict[str, Any] = {"seed": 2, "world_size": 4, "micro_batches": 2}
    ranks = []
    for rank in range(4):
        loader = MixLoader(specs, COLLATE, rank=rank, **options)
        loader.load_state_dict(state)
        ranks.append(rows_of(take(loader, 5)))
        assert loader.state_dict()["step"] == 9
    assert begun + joined(ranks) == whole
    assert rows_of(take(MixLoader(specs, COLLATE, seed=2, start_step=7), 2)) == whole[7:]


def test_another_batch_size_loses_and_repeats_nothing(tmp_path: Path) -> None:
    folder = write_documents(tmp_path, count=48, per_shard=7)
    first = MixLoader([one(folder, batch_size=8, lanes=4)], COLLATE)
    keys = [key for step in take(first, 2) for key in step.batches["d"][0].keys]
    second = MixLoader([one(folder, batch_size=16, lanes=4)], COLLATE)
    second.load_state_dict(first.state_dict())
    keys += [key for step in take(second, 2) for key in step.batches["d"][0].keys]
    assert len(set(keys)) == 48
    assert second.state_dict()["datasets"]["d"]["lane_position"] == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lanes": 2}, "lanes 4 -> 2"),
        ({"block": 3}, "block 16 -> 3"),
        ({"kind": "text"}, "kind 'interleaved' -> 'text'"),
        ({"name": "e"}, r"datasets \['d'\], this mixture has \['e'\]"),
    ],
)
def test_a_changed_order_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write_documents(tmp_path)
    state = MixLoader([one(folder)], COLLATE).state_dict()
    with pytest.raises(UserError, match=message):
        MixLoader([one(folder, **change)], COLLATE).load_state_dict(state)


def test_changed_shards_and_seed_are_refused(tmp_path: Path) -> None:
    folder = write_documents(tmp_path)
    state = MixLoader([one(folder)], COLLATE).state_dict()
    with pytest.raises(UserError, match="seed 0 -> 1"):
        MixLoader([one(folder)], COLLATE, seed=1).load_state_dict(state)
    write_documents(folder, count=21)
    with pytest.raises(UserError, match="shards 5 -> 6; samples 20 -> 21"):
        MixLoader([one(folder)], COLLATE).load_state_dict(state)
    with pytest.raises(UserError, match="version 7"):
        MixLoader([one(folder)], COLLATE).load_state_dict(state | {"v": 7})


def test_missing_and_truncated_shards_stop_before_the_first_batch(tmp_path: Path) -> None:
    folder = write_documents(tmp_path)
    shard = folder / "documents-000002.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"documents-000002\.tar has 3000 bytes but its index"):
        MixLoader([one(folder)], COLLATE)
    shard.unlink()
    with pytest.raises(UserError, match=r"dataset 'd': shard .*documents-000002\.tar does not exist"):
        MixLoader([one(folder)], COLLATE)
    with pytest.raises(UserError, match="dataset 'd': shards is empty; give at least one tar, folder or pattern"):
        MixLoader([one(folder, shards=[])], COLLATE)
    with pytest.raises(UserError, match="no shards in"):
        MixLoader([one(tmp_path / "x*.tar")], COLLATE)
    with pytest.raises(UserError, match=r"dataset 'd' has no sample of kind 'pairs'"):
        MixLoader([one(make_tar(tmp_path / "e.tar", [("a.json", b"{}")]), kind="pairs")], COLLATE)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_document_without_its_images_stops_with_one_sentence(tmp_path: Path, workers: int) -> None:
    body = b'{"v":1,"nodes":[{"i":0},{"t":"x"},{"i":1}]}'
    shard = make_tar(tmp_path / "x.tar", [("k.json", body), ("k.000.png", b"")])
    with pytest.raises(UserError) as caught:
        take(MixLoader([one(shard)], COLLATE, num_workers=workers), 1)
    assert "row 0 (key 'k'): its nodes name image 1 but it has 1 images" in str(caught.value)
    assert "\n" not in str(caught.value)


def damaged(folder: Path, bad: set[int], count: int = 60) -> Path:
    """Documents of which some have an image that cannot be decoded."""
    with ShardWriter(folder, "s", 20) as writer:
        for number in range(count):
            document = numbered_document(number, 1)
            if number in bad:
                document.images[0] = document.images[0][:45]
            writer.write(document)
    return folder


def test_bad_images_are_replaced_alike_everywhere_and_counted(tmp_path: Path) -> None:
    specs = [one(damaged(tmp_path, {7, 31}), batch_size=20, lanes=4)]
    loader = MixLoader(specs, COLLATE, max_bad_rate=0.1)
    expected = rows_of(take(loader, 6))
    names = {"s-000000-00000007", "s-000001-00000011"}
    assert loader.bad.total >= 4  # two in each of two epochs, and where a replacement was bad again
    assert {sample.key for sample in loader.bad.by_sample} == names
    assert loader.bad.by_reason() == {("d", "undecodable"): loader.bad.total}
    assert loader.bad.seen == 120
    again = MixLoader(specs, COLLATE, max_bad_rate=0.1, micro_batches=5)
    assert rows_of(take(again, 6)) == expected
    assert not any(row[0] in names for step in expected for row in step["d"])


def test_too_many_bad_images_stop_the_run(tmp_path: Path) -> None:
    folder = damaged(tmp_path, set(range(0, 60, 5)))
    with pytest.raises(UserError, match=r"9 of \d+ samples were bad \(limit 2% and 8\).*key 's-.*undecodable"):
        take(MixLoader([one(folder, batch_size=5)], COLLATE), 100)
    with pytest.raises(UserError, match=r"a sample and its 8 replacements were all bad.*python -m data verify"):
        take(MixLoader([one(damaged(tmp_path / "all", set(range(60))))], COLLATE), 1)


def test_rare_bad_samples_never_stop_a_run() -> None:
    counter = BadSampleCounter(max_rate=0.02, grace=8)
    sample = BadSample("d", "undecodable", "s", "k", "")
    for _ in range(2000):
        counter.add(100, [sample, sample])
    assert counter.total == 4000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"kind": "video"}, "kind=video is not one of interleaved, pairs, text"),
        ({"labels": "all"}, "labels=all is not one of text, openflamingo"),
        ({"crop": "end"}, "crop=end is not one of random, start"),
        ({"max_tokens": 1}, "max_tokens=1"),
        ({"lanes": 3}, "lanes=3 must divide batch_size=4"),
        ({"next_image_probability": 1.5}, "next_image_probability=1.5 must be at most 1"),
    ],
)
def test_values_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"dataset 'd': {message}"):
        one(Path("x"), **options)


def test_batches_that_cannot_be_divided(tmp_path: Path) -> None:
    folder = write_documents(tmp_path)
    with pytest.raises(UserError, match="batch_size=4 cannot be divided among 3 processes x 1"):
        MixLoader([one(folder)], COLLATE, world_size=3)
    with pytest.raises(UserError, match="different names"):
        MixLoader([one(folder), one(folder)], COLLATE)


def test_shards_from_folders_patterns_and_files(tmp_path: Path) -> None:
    folder = write_documents(tmp_path, count=8)
    first, second = (str(folder / f"documents-00000{n}.tar") for n in range(2))
    assert resolve_shards([str(folder)]) == resolve_shards([str(folder / "*.tar")]) == [first, second]
    assert resolve_shards([second, first]) == [second, first]
    (folder / "_dataset.json").unlink()
    assert resolve_shards([str(folder)]) == [first, second]
