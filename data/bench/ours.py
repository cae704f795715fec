"""This loader doing the same work: the same shards, tokenizer, image size, crops and images per document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data.batches.collate import FlamingoCollate
from data.bench.material import Material, tokenizer_of
from data.dataset import DatasetSpec
from data.loading.loader import MixLoader
from flamingo.processor import FlamingoProcessor, ImageTransform


def spec_of(material: Material, what: str, batch: int, **options: Any) -> DatasetSpec:
    """Return the dataset of a measurement: "mmc4", "raw" (the same documents, images as members) or "pairs"."""
    folder = str(getattr(material, what))
    if what == "pairs":
        values: dict[str, Any] = {"kind": "pairs", "max_tokens": 32, "max_images": 1, "flip": True}
    else:
        values = {"max_tokens": 256, "max_images": 6, "labels": "openflamingo", "crop": "start", "flip": True}
    return DatasetSpec(name=what, shards=[folder], batch_size=batch, **(values | options))


def collate_of(material: Material, size: int) -> FlamingoCollate:
    """Return the collate of a measurement: images of `size` pixels a side, cropped as CLIP does."""
    return FlamingoCollate(FlamingoProcessor(tokenizer_of(material), ImageTransform(size, mode="crop")))


def batches(material: Material, what: str, size: int, batch: int, workers: int) -> Iterator[tuple[int, int]]:
    """Yield (documents, images that a token sees) for each batch, endlessly."""
    loader = MixLoader([spec_of(material, what, batch)], collate_of(material, size), num_workers=workers)
    for step in loader:
        made = step.batches[what][0]
        yield len(made.keys), made.stats["images"]
