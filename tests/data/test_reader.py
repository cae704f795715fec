"""What is read of a sample: all that is needed, little else, in few reads."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches.collate import FlamingoCollate
from data.dataset import DatasetSpec, open_store
from data.loading.loader import MixLoader
from data.shards.document import Document, Image, Text
from data.shards.reader import SLACK, ShardReader, runs
from data.shards.writer import ShardWriter
from tests.data.helpers import byte_processor, shards_of
from tests.fixtures import encoded, random_image


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([], []),
        ([(512, 100)], [(512, 100)]),
        ([(512, 100), (1536, 100)], [(512, 100), (1536, 100)]),  # a header between small members is not worth it
        ([(512, 90_000), (91_000, 90_000)], [(512, 180_488)]),
        ([(91_000, 90_000), (512, 90_000)], [(512, 180_488)]),
        ([(0, 30_000), (31_000, 60), (32_000, 200)], [(0, 31_060), (32_000, 200)]),
    ],
)
def test_neighbours_are_read_together(places: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    assert runs(places) == expected


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 50_000)), max_size=12))
def test_reads_cover_what_is_wanted_and_little_more(sizes: list[tuple[int, int]]) -> None:
    places, at = [], 0
    for gap, size in sizes:
        places.append((at + gap, size))
        at += gap + size
    found = runs(places)
    assert all(any(a <= b and b + n <= a + m for a, m in found) for b, n in places)
    wanted = sum(size for _, size in places)
    assert wanted <= sum(size for _, size in found) <= wanted * (1 + SLACK)
    assert all(a + m <= b for (a, m), (b, _) in itertools.pairwise(found))


def jpegs(number: int) -> list[bytes]:
    return [encoded(random_image("RGB", (160, 160), seed), "JPEG", quality=98) for seed in range(number)]


def test_a_document_costs_the_images_that_its_row_shows(tmp_path: Path) -> None:
    images = jpegs(10)
    with ShardWriter(tmp_path, "s") as writer:
        nodes = [node for number in range(10) for node in (Image((number,)), Text(f"number {number} "))]
        writer.write(Document("", nodes, images))
    spec = DatasetSpec(name="d", shards=[str(tmp_path)], batch_size=1, max_images=3, crop="start")
    loader = MixLoader([spec], FlamingoCollate(byte_processor()), prefetch_factor=0)
    batch = next(iter(loader)).batches["d"][0]
    assert batch.tensors["image_counts"].tolist() == [3]
    shown = sum(map(len, images[:3]))
    assert shown < shards_of(loader).reader.bytes_read < shown * 1.1
    assert shards_of(loader).reader.bytes_read < sum(map(len, images)) / 2


def test_a_pair_is_read_whole_with_little_else(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s", layout="pairs") as writer:
        for image in jpegs(8):
            writer.write(Document("", [Image((0,)), Text("a caption")], [image], {"facts": list(range(40))}))
    corpus = open_store(DatasetSpec(name="d", shards=[str(tmp_path)], batch_size=1, kind="pairs"))
    reader = ShardReader(corpus.indexes)
    index = corpus.indexes[0]
    wanted = 0
    for row in range(8):
        sample = reader.sample(0, row)
        assert sample.image(0)[:2] == b"\xff\xd8"
        assert sample.nodes[1] == Text("a caption")
        wanted += sum(size for *_, size in index.members(row))
    assert wanted <= reader.bytes_read <= 1.04 * wanted
    before = reader.bytes_read
    reader.sample(0, 0, images=False)
    assert reader.bytes_read - before < 400
    assert np.diff(index.first).tolist() == [3] * 8
