"""Batches: every image beside its own text, and what the three objectives get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from data.batches.collate import FlamingoCollate, LanguageCollate, PairCollate
from data.batches.tokenize import IGNORED
from data.dataset import DatasetSpec
from data.loading.loader import Batch, MixLoader
from data.shards.document import Document, Image, Node, Text
from data.shards.writer import ShardWriter
from flamingo.errors import UserError
from tests.data.helpers import SIDE, byte_processor, numbered_document, write_documents
from tests.fixtures import byte_tokenizer, encoded, png, random_image

PROCESSOR = byte_processor()


def one_batch(folder: Path, collate: Any, **options: Any) -> Batch:
    values: dict[str, Any] = {"name": "d", "shards": [str(folder)], "batch_size": 4}
    spec = DatasetSpec(**(values | options))
    return next(iter(MixLoader([spec], collate))).batches["d"][0]


def check_images_go_with_their_text(batch: Batch) -> int:
    """In numbered documents a text says the brightness of its image. Returns how many words were checked."""
    pixels = batch.tensors["pixel_values"].float().mean(dim=(1, 2, 3, 4))
    assert len(pixels) == batch.tensors["image_counts"].sum()
    checked, first = 0, 0
    for row, count in enumerate(batch.tensors["image_counts"].tolist()):
        ids, phi = batch.tensors["input_ids"][row], batch.tensors["phi"][row]
        for number in range(1, count + 1):
            seen = ids[(phi == number) & (ids < 256)]
            for word in str(PROCESSOR.tokenizer.decode(seen)).split()[1:-1]:  # a window may cut the first and last
                assert int(word) % 256 == pixels[first + number - 1]
                checked += 1
        first += count
    return checked


@settings(max_examples=15, deadline=None)
@given(
    images=st.integers(1, 7),
    max_tokens=st.integers(8, 120),
    max_images=st.integers(1, 8),
    order=st.randoms(use_true_random=False),
)
def test_images_go_with_their_own_text(
    tmp_path_factory: pytest.TempPathFactory, images: int, max_tokens: int, max_images: int, order: Any
) -> None:
    folder = tmp_path_factory.mktemp("documents")
    with ShardWriter(folder, "s", 3) as writer:
        for number in range(8):
            document = numbered_document(number * images, images, words=5)
            stored = list(range(images))  # stored in another order than shown
            order.shuffle(stored)
            document.images = [document.images[old] for old in stored]
            document.nodes = [
                Image((stored.index(n.frames[0]),)) if isinstance(n, Image) else n for n in document.nodes
            ]
            writer.write(document)
    options = {"batch_size": 8, "max_tokens": max_tokens, "max_images": max_images}
    checked = check_images_go_with_their_text(one_batch(folder, FlamingoCollate(PROCESSOR), **options))
    assert checked > 0 or max_tokens < 60


def test_shapes_padding_and_types(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s") as writer:
        writer.write(Document("long", [Image((0,)), Text("words"), Image((1,)), Text("w")], [png(1), png(2, side=20)]))
        writer.write(Document("text", [Text("ab")], []))
    batch = one_batch(tmp_path, FlamingoCollate(PROCESSOR), batch_size=2)
    t = {
        name: tensor[[batch.keys.index("long"), batch.keys.index("text")]]
        if len(tensor) == 2 and name != "pixel_values"
        else tensor
        for name, tensor in batch.tensors.items()
    }
    assert t["input_ids"].shape == t["phi"].shape == t["labels"].shape == t["attention_mask"].shape == (2, 11)
    assert t["attention_mask"].sum(1).tolist() == [11, 4]
    assert t["input_ids"][1, 4:].tolist() == [PROCESSOR.tokenizer.pad_token_id] * 7
    assert t["labels"][1, 4:].tolist() == [IGNORED] * 7
    assert t["phi"][1].tolist() == [0] * 11
    assert t["image_counts"].tolist() == [2, 0]
    assert (t["pixel_values"].shape, t["pixel_values"].dtype) == ((2, 1, 3, SIDE, SIDE), torch.uint8)
    assert batch.stats == {"rows": 2, "bad": 0, "tokens": 15, "labels": 13, "images": 2}


def test_a_training_row_is_the_prompt_of_the_processor(tmp_path: Path) -> None:
    images = [encoded(random_image("RGB", (20, 12), seed), "PNG") for seed in range(3)]
    turns = list(zip(images, ("a <image> cat", " dog", ""), strict=True))
    with ShardWriter(tmp_path, "s") as writer:
        nodes = [node for number, (_, text) in enumerate(turns) for node in (Image((number,)), Text(text))]
        writer.write(Document("", nodes, images))
    row = one_batch(tmp_path, FlamingoCollate(PROCESSOR), batch_size=1).tensors
    chat = [
        part for image, text in turns for part in ({"type": "image", "image": image}, {"type": "text", "text": text})
    ]
    prompt = PROCESSOR(text=[chat])
    assert torch.equal(row["input_ids"][:, :-2], prompt["input_ids"])  # a training row ends with EOC and EOS
    assert row["input_ids"][0, -2:].tolist() == [PROCESSOR.eoc_token_id, PROCESSOR.eos_token_id]
    assert torch.equal(row["pixel_values"], prompt["pixel_values"])
    assert torch.equal(row["image_counts"], prompt["image_counts"])


def test_no_images_at_all(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s") as writer:
        writer.write(Document("", [Text("ab")], []))
    batch = one_batch(tmp_path, FlamingoCollate(PROCESSOR))
    assert batch.tensors["pixel_values"].shape == (0, 1, 3, SIDE, SIDE)
    folder = write_documents(tmp_path / "p")
    batch = one_batch(folder, FlamingoCollate(PROCESSOR), kind="text")
    assert batch.tensors["image_counts"].tolist() == [0] * 4


def test_a_image_shown_twice_comes_twice(tmp_path: Path) -> None:
    nodes: list[Node] = [Image((0,)), Text("a"), Image((1,)), Text("b"), Image((0,)), Text("a")]
    with ShardWriter(tmp_path, "s") as writer:
        writer.write(Document("", nodes, [png(7), png(9)]))
    batch = one_batch(tmp_path, FlamingoCollate(PROCESSOR), batch_size=1)
    assert batch.tensors["pixel_values"][:, 0, 0, 0, 0].tolist() == [7, 9, 7]


@pytest.mark.parametrize(("frames", "expected"), [(2, [1, 2]), (4, [1, 2, 3, 3]), (1, [1])])
def test_clips_have_the_datasets_number_of_frames(tmp_path: Path, frames: int, expected: list[int]) -> None:
    with ShardWriter(tmp_path, "s") as writer:
        writer.write(Document("", [Image((1, 2, 3), 1.0), Text("x")], [png(n) for n in range(4)]))
    options = {"batch_size": 1, "max_frames": frames, "crop": "start"}
    pixels = one_batch(tmp_path, FlamingoCollate(PROCESSOR), **options).tensors["pixel_values"]
    assert pixels.shape == (1, frames, 3, SIDE, SIDE)
    assert pixels[0, :, 0, 0, 0].tolist() == expected


def test_flips_are_drawn_for_each_image_and_only_where_asked(tmp_path: Path) -> None:
    image = torch.zeros((SIDE, SIDE, 3), dtype=torch.uint8).numpy()
    image[:, 0] = 255
    data = encoded(PILImage.fromarray(image), "PNG")
    with ShardWriter(tmp_path, "s") as writer:
        for _ in range(16):
            writer.write(Document("", [Image((0,)), Text("a"), Image((1,)), Text("b")], [data, data]))
    collate = FlamingoCollate(PROCESSOR)
    still = one_batch(tmp_path, collate, batch_size=16).tensors["pixel_values"]
    assert bool((still[:, 0, :, :, 0] == 255).all())
    flipped = one_batch(tmp_path, collate, batch_size=16, flip=True).tensors["pixel_values"][:, 0, 0, 0, -1] == 255
    assert 4 < int(flipped.sum()) < 28
    assert len(set(map(tuple, flipped.view(16, 2).tolist()))) > 2  # two images of a document fall differently


def test_language_rows(tmp_path: Path) -> None:
    nodes: list[Node] = [Image((0,)), Text("q?", loss=False), Text(" a"), Image((0,)), Image((0,)), Text("b")]
    with ShardWriter(tmp_path, "s") as writer:
        writer.write(Document("", nodes, [png(0)]))
        writer.write(Document("images-only", [Image((0,))], [png(0)]))
    tokenizer = byte_tokenizer()
    batch = one_batch(tmp_path, LanguageCollate(tokenizer), batch_size=2)
    assert set(batch.tensors) == {"input_ids", "attention_mask", "labels"}
    assert tokenizer.decode(batch.tensors["input_ids"][0]) == "q? a\nb<eos>"
    assert tokenizer.decode(batch.tensors["labels"][0].clamp(min=0)[2:]) == " a\nb<eos>"
    assert batch.tensors["labels"][0][:2].tolist() == [IGNORED] * 2
    assert [bad.reason for bad in batch.bad] == ["no text"] * len(batch.bad)
    cut = one_batch(tmp_path, LanguageCollate(tokenizer), batch_size=2, max_tokens=3)
    assert cut.tensors["input_ids"].shape == (2, 3)


def test_text_of_a_tokenizer_without_padding(tmp_path: Path) -> None:
    """GPT-2's and LLaMA's have none. Padding is neither seen nor in the loss; the end of a text is."""
    with ShardWriter(tmp_path, "s") as writer:
        for text in ("long text", "short"):
            writer.write(Document("", [Text(text)], []))
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tensors = one_batch(tmp_path, LanguageCollate(tokenizer), batch_size=2).tensors
    for ids, mask, labels in zip(tensors["input_ids"], tensors["attention_mask"], tensors["labels"], strict=True):
        assert labels[mask == 0].tolist() == [IGNORED] * int((mask == 0).sum())
        assert labels[mask == 1].tolist() == ids[mask == 1].tolist()
        assert int(ids[mask == 1][-1]) == tokenizer.eos_token_id
    assert sorted(tensors["attention_mask"].sum(1).tolist()) == [6, 10]


def test_a_tokenizer_without_an_end_of_text_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token; set its eos_token"):
        LanguageCollate(tokenizer)


def test_pairs(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s", layout="pairs") as writer:
        for number in range(6):
            writer.write(Document("", [Image((0,)), Text(f" {number}")], [png(number)]))

    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[int(text), 0] for text in texts])

    batch = one_batch(tmp_path, PairCollate(tokenize, PROCESSOR.image_transform), kind="pairs")
    assert batch.tensors["image"].shape == (4, 3, SIDE, SIDE)
    assert batch.tensors["image"][:, 0, 0, 0].tolist() == batch.tensors["text"][:, 0].tolist()


def test_a_batch_moves() -> None:
    batch = Batch("d", {"x": torch.ones(2)}, ["k"])
    assert batch.to("meta").tensors["x"].device.type == "meta"
    assert batch.to("cpu").keys == ["k"]
