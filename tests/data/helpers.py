"""Documents, images and a byte tokenizer for the tests of the data engine."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.loading.loader import MixLoader
from data.shard_store import ShardStore
from data.shards.document import Document, Image, Node, Text
from data.shards.writer import ShardWriter
from flamingo.processor import FlamingoProcessor
from flamingo.vision.transform import ImageTransform

SIDE = 8


def png(value: int, side: int = SIDE) -> bytes:
    """A grey image whose every pixel has this value."""
    return encoded(PILImage.new("RGB", (side, side), (value, value, value)), "PNG")


def encoded(image: PILImage.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, `<eos>` and `<pad>`, no BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def byte_processor() -> FlamingoProcessor:
    """A processor over bytes and images of SIDE pixels."""
    return FlamingoProcessor(byte_tokenizer(), ImageTransform(SIDE, mode="squash"))


def shards_of(loader: MixLoader, number: int = 0) -> ShardStore:
    """The opened shards of a loader's dataset."""
    store = loader.datasets[number].store
    assert isinstance(store, ShardStore)
    return store


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two batches have the same tensors, to the byte."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def random_image(mode: str, size: tuple[int, int], seed: int = 0) -> PILImage.Image:
    """Smooth random colours in a mode of Pillow."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return PILImage.fromarray(small).resize(size, PILImage.Resampling.BICUBIC).convert(mode)
