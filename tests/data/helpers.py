"""Documents and a processor for the tests of the data engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data.loading.loader import MixLoader
from data.shard_store import ShardStore
from data.shards.document import Document, Image, Node, Text
from data.shards.writer import ShardWriter
from tests.fixtures import byte_tokenizer, png

if TYPE_CHECKING:  # tests of shards alone start without torch and transformers
    import torch

    from flamingo import FlamingoProcessor

SIDE = 8


def numbered_document(first: int, images: int, key: str = "", words: int = 1) -> Document:
    """Image of brightness v followed by the text "v v ...", for v = first, first + 1, ..."""
    nodes: list[Node] = []
    for number in range(images):
        nodes += [Image((number,)), Text(" ".join([str(first + number)] * words))]
    return Document(key, nodes, [png((first + number) % 256) for number in range(images)])


def write_documents(
    folder: Path, prefix: str = "documents", count: int = 20, per_shard: int = 4, images: int = 2
) -> Path:
    """`count` numbered documents, no two alike."""
    with ShardWriter(folder, prefix, per_shard) as writer:
        for number in range(count):
            writer.write(numbered_document(number * images, images, words=1 + number % 3))
    return folder


def byte_processor() -> FlamingoProcessor:
    """A processor over bytes and images of SIDE pixels."""
    from flamingo import FlamingoProcessor, ImageTransform

    return FlamingoProcessor(byte_tokenizer(), ImageTransform(SIDE, mode="squash"))


def shards_of(loader: MixLoader, number: int = 0) -> ShardStore:
    """The opened shards of a loader's dataset."""
    store = loader.datasets[number].store
    assert isinstance(store, ShardStore)
    return store


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two batches have the same tensors, to the byte."""
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
