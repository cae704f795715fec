"""Colour augmentation, and the documents with a single image that a recipe keeps only some of."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batches.collate import FlamingoCollate
from data.batches.decode import jittered
from data.dataset import DatasetSpec
from data.loading.loader import MixLoader
from data.shards.writer import ShardWriter
from flamingo.errors import UserError
from tests.data.helpers import byte_processor, numbered_document, same

COLLATE = FlamingoCollate(byte_processor())
MIDDLE = (0.5, 0.5, 0.5)


def noise(side: int = 16) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(60, 180, (3, side, side), dtype=np.uint8))


def test_each_of_the_three_factors() -> None:
    frame = noise()
    assert torch.equal(jittered(frame, 0.4, MIDDLE), frame)
    brighter = jittered(frame, 0.4, (0.75, 0.5, 0.5))  # times 1.2
    assert torch.equal(brighter, (frame.float() * 1.2).round().to(torch.uint8))
    assert jittered(frame, 0.4, (0.5, 1.0, 0.5)).float().std() > 1.3 * frame.float().std()
    flat = jittered(frame, 0.9, (0.5, 0.0, 0.5)).float()
    assert flat.std() < 0.2 * frame.float().std()
    assert abs(float(flat.mean()) - float(frame.float().mean())) < 3
    grey = jittered(frame, 0.99, (0.5, 0.5, 0.0)).float()
    assert (grey.amax(0) - grey.amin(0)).max() <= 2
    turned = frame.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # however it lies in memory
    assert torch.equal(jittered(turned, 0.3, (0.1, 0.9, 0.3)), jittered(frame, 0.3, (0.1, 0.9, 0.3)))


def mixed(folder: Path) -> Path:
    """24 documents with one image and 24 with two."""
    with ShardWriter(folder, "s", 8) as writer:
        for number in range(48):
            writer.write(numbered_document(2 * number, 1 + number % 2))
    return folder


def test_colour_changes_images_and_nothing_else(tmp_path: Path) -> None:
    folder = str(mixed(tmp_path))
    plain, coloured, again = (
        next(
            iter(
                MixLoader([DatasetSpec(name="d", shards=[folder], batch_size=16, colour=c)], COLLATE, prefetch_factor=0)
            )
        )
        .batches["d"][0]
        .tensors
        for c in (0.0, 0.3, 0.3)
    )
    assert same(coloured, again)
    assert same({**coloured, "pixel_values": plain["pixel_values"]}, plain)
    factor = coloured["pixel_values"].float().mean((1, 2, 3, 4)) / plain["pixel_values"].float().mean((1, 2, 3, 4))
    factor = factor[plain["pixel_values"].float().mean((1, 2, 3, 4)) > 40]
    assert factor.min() >= 0.68
    assert factor.max() <= 1.32
    assert len(factor.unique()) > 10  # an image has its own


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_a_share_of_the_single_images_is_kept(tmp_path: Path, share: float) -> None:
    spec = DatasetSpec(name="d", shards=[str(mixed(tmp_path))], batch_size=16, lanes=1, single_image_share=share)
    loader = MixLoader([spec], COLLATE, prefetch_factor=0)
    counts = torch.cat(
        [step.batches["d"][0].tensors["image_counts"] for step in itertools.islice(loader, 30)]  # ten epochs
    )
    single = float((counts == 1).float().mean())
    # Of two a document each with one half of the documents: p / (1 + p), where p is the share.
    assert abs(single - share / (1 + share)) < 0.05
    assert loader.bad.total == 0


def test_where_all_have_a_single_image_one_is_taken_all_the_same(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s", 8) as writer:
        for number in range(16):
            writer.write(numbered_document(number, 1))
    spec = DatasetSpec(name="d", shards=[str(tmp_path)], batch_size=8, single_image_share=0.0)
    batch = next(iter(MixLoader([spec], COLLATE))).batches["d"][0]
    assert batch.tensors["image_counts"].tolist() == [1] * 8
    assert batch.bad == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"colour": 1.5}, "colour=1.5 must be below 1"),
        ({"single_image_share": 2.0}, "single_image_share=2.0 must be at most 1"),
        ({"single_image_share": 0.5, "kind": "pairs"}, "a pair has a single image"),
    ],
)
def test_mistakes(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DatasetSpec(name="d", shards=["x"], batch_size=4, **options)  # type: ignore[arg-type]
