"""The same samples in the same global batches, whoever reads them; and how little it takes to begin anywhere."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.batches.collate import FlamingoCollate
from data.dataset import DatasetSpec
from data.loading.loader import MixLoader, StepBatches
from data.shards.document import Document, Image, Text
from data.shards.writer import ShardWriter
from tests.data.helpers import byte_processor, numbered_document, shards_of, write_documents
from tests.fixtures import png

COLLATE = FlamingoCollate(byte_processor())
# The layouts that the loader promises to be equal, (world size, workers of each rank).
LAYOUTS = [(1, 0), (1, 2), (2, 1), (2, 2), (4, 1), (8, 3)]


def mixture(folder: Path) -> list[DatasetSpec]:
    """Documents and pairs, packed and not, with every random choice switched on, and one image in ten broken."""
    if not folder.exists():
        write_documents(folder / "documents", count=61, per_shard=7, images=3)
        with ShardWriter(folder / "pairs", "p", 9, layout="pairs") as writer:
            for number in range(50):
                data = png(number)[: 40 if number % 10 == 3 else None]
                writer.write(Document("", [Image((0,)), Text(f"caption number {number}")], [data]))
    documents: dict[str, Any] = {"max_tokens": 14, "max_images": 2, "next_image_probability": 0.5, "flip": True}
    pairs: dict[str, Any] = {"kind": "pairs", "space_probability": 0.5, "max_tokens": 32, "max_images": 1}
    return [
        DatasetSpec(name="documents", shards=[str(folder / "documents")], batch_size=16, block=2, **documents),
        DatasetSpec(name="short", shards=[str(folder / "documents")], batch_size=16, block=3, pack=40, **documents),
        DatasetSpec(name="pairs", shards=[str(folder / "pairs")], batch_size=24, lanes=8, pack=64, **pairs),
    ]


def contents(step: StepBatches) -> dict[str, list[tuple[Any, ...]]]:
    """For each dataset its keys, and each sample's tokens, phi, labels and image bytes, in any order."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for name, pieces in step.batches.items():
        rows = found.setdefault(name, [])
        for batch in pieces:
            rows += [(key,) for key in batch.keys]
            t, first = batch.tensors, 0
            sequences = t.get("sequence_ids", t["attention_mask"])
            for row, count in enumerate(t["image_counts"].tolist()):
                for sequence in range(1, int(sequences[row].max()) + 1):
                    inside = sequences[row] == sequence
                    phi = t["phi"][row][inside]
                    shown = sorted({*phi.tolist()} - {0})
                    images = tuple(t["pixel_values"][first + n - 1].numpy().tobytes() for n in shown)
                    phi = phi.sub(min(shown, default=1) - 1).clamp(min=0)
                    texts = (t[part][row][inside].tolist() for part in ("input_ids", "labels"))
                    ids, labels = (tuple(text) for text in texts)
                    # The first label of a packed sample is left out: nothing predicts it.
                    rows.append((ids, labels[1:], tuple(phi.tolist()), images))
                first += count
    return {name: sorted(rows, key=repr) for name, rows in found.items()}


def global_batches(specs: list[DatasetSpec], world: int, workers: int, steps: int, **options: Any) -> list[Any]:
    """Every rank's share of each step, put together."""
    loaders = [
        MixLoader(specs, COLLATE, rank=rank, world_size=world, num_workers=workers, max_bad_rate=0.5, **options)
        for rank in range(world)
    ]
    ranks = [[contents(step) for step in itertools.islice(loader, steps)] for loader in loaders]
    joined = []
    for step in zip(*ranks, strict=True):
        names = step[0].keys()
        joined.append({name: sorted((row for rank in step for row in rank[name]), key=repr) for name in names})
    return joined


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> list[DatasetSpec]:
    return mixture(tmp_path_factory.mktemp("order") / "m")


@pytest.fixture(scope="module")
def expected(specs: list[DatasetSpec]) -> list[Any]:
    return global_batches(specs, 1, 0, 4, seed=3, prefetch_factor=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # three workers on two cores
@pytest.mark.parametrize(("world", "workers"), LAYOUTS)
def test_global_batches_are_equal(specs: list[DatasetSpec], expected: list[Any], world: int, workers: int) -> None:
    assert global_batches(specs, world, workers, 4, seed=3) == expected


@pytest.mark.parametrize(("world", "micro"), [(2, 1), (1, 4), (4, 2)])
def test_and_so_are_those_of_micro_batches(
    specs: list[DatasetSpec], expected: list[Any], world: int, micro: int
) -> None:
    assert global_batches(specs, world, 0, 4, seed=3, micro_batches=micro) == expected
    assert len({repr(step) for step in expected}) == 4


def test_broken_images_were_replaced_in_them(specs: list[DatasetSpec], expected: list[Any]) -> None:
    keys = Counter(row[0] for step in expected for row in step["pairs"] if len(row) == 1)
    assert keys.total() == 96
    assert not any(int(key[-8:]) + 9 * int(key[2:8]) in range(3, 50, 10) for key in keys)


def test_every_sample_once_an_epoch_also_when_packed(tmp_path: Path) -> None:
    folder = write_documents(tmp_path, count=48, per_shard=7)
    spec = DatasetSpec(name="d", shards=[str(folder)], batch_size=16, pack=256)
    loader = MixLoader([spec], COLLATE)
    for _ in range(3):
        keys = Counter(key for step in itertools.islice(loader, 3) for key in step.batches["d"][0].keys)
        assert len(keys) == 48
        assert set(keys.values()) == {1}


def test_to_begin_at_step_one_million_reads_one_batch(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s", 100) as writer:
        for number in range(1000):
            writer.write(numbered_document(number, 1))
    spec = DatasetSpec(name="d", shards=[str(tmp_path)], batch_size=8, block=2)
    begun = MixLoader([spec], COLLATE, prefetch_factor=0)
    state = json.loads(json.dumps(begun.state_dict()))
    state["step"], state["datasets"]["d"]["lane_position"] = 1_000_000, 1_000_000
    loader = MixLoader([spec], COLLATE, prefetch_factor=0)
    loader.load_state_dict(state)
    assert next(iter(loader)).step == 1_000_000
    reader, plan = shards_of(loader).reader, loader.datasets[0].plan
    assert reader.samples_read == 8
    assert reader.bytes_read < 8 * 4096
    # The shards of one epoch, and the samples of one block for each of the 8 lanes.
    assert plan.drawn <= 10 + 8 * 200
    assert len(json.dumps(loader.state_dict())) < 4096
