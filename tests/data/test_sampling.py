"""The paper's sampling (sections 2.2 to 3.1.3 and its appendix): what is drawn, and that the presets ask for it."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from data.batches.collate import FlamingoCollate, clip_frames
from data.batches.tokenize import quick_encoder
from data.dataset import DatasetSpec, dataset_specs
from data.loading.loader import MixLoader
from data.shards.document import Document, Image, Node, Text
from data.shards.writer import ShardWriter
from flamingo.training.compose import compose
from flamingo.vision.transform import ImageTransform
from tests.data.helpers import SIDE, byte_processor
from tests.fixtures import byte_tokenizer, encoded, png

PROCESSOR = byte_processor()


def batches(
    folder: Path, documents: list[list[Node]], images: list[bytes], steps: int = 1, **options: Any
) -> list[Any]:
    with ShardWriter(folder, "s") as writer:
        for nodes in documents:
            writer.write(Document("", nodes, images))
    values: dict[str, Any] = {"name": "d", "shards": [str(folder)], "batch_size": len(documents)}
    loader = MixLoader([DatasetSpec(**(values | options))], FlamingoCollate(PROCESSOR), prefetch_factor=0)
    return [step.batches["d"][0] for step in itertools.islice(loader, steps)]


def test_half_of_the_pairs_get_one_space_in_front(tmp_path: Path) -> None:
    documents: list[list[Node]] = [[Image((0,)), Text("abc")] for _ in range(64)]
    batch = batches(tmp_path, documents, [png(1)], space_probability=0.5)[0]
    texts = [PROCESSOR.tokenizer.decode(ids[1:5]) for ids in batch.tensors["input_ids"]]
    assert set(texts) == {"abc<|endofchunk|>", " abc"}
    assert 16 < texts.count(" abc") < 48


def test_a_long_caption_keeps_its_image_whatever_the_window(tmp_path: Path) -> None:
    documents: list[list[Node]] = [[Image((0,)), Text("x" * 90)] for _ in range(8)]
    batch = batches(tmp_path, documents, [png(1)], kind="pairs", max_tokens=32, crop="random")[0]
    assert batch.tensors["image_counts"].tolist() == [1] * 8
    assert (batch.tensors["input_ids"][:, 0] == PROCESSOR.image_token_id).all()
    assert batch.tensors["input_ids"].shape == (8, 32)


@pytest.mark.parametrize(
    ("text", "may"),
    [("a dog", True), ("the LEFT one", False), ("to the right.", False), ("a left-hand turn", False),
     ("bright leftovers", True), ("on the rightmost", False)],
)  # fmt: skip
def test_nothing_is_mirrored_that_says_left_or_right(tmp_path: Path, text: str, may: bool) -> None:
    striped = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    striped[:, 0] = 255
    documents: list[list[Node]] = [[Image((0,)), Text(text)] for _ in range(24)]
    data = encoded(PILImage.fromarray(striped), "PNG")
    pixels = batches(tmp_path, documents, [data], flip=True)[0].tensors["pixel_values"]
    mirrored = int((pixels[:, 0, 0, 0, -1] == 255).sum())
    assert (0 < mirrored < 24) if may else mirrored == 0


@pytest.mark.parametrize(
    ("stored", "fps", "wanted", "expected"),
    [
        (40, 4.0, 1.0, [0, 4, 8, 12, 16, 20, 24, 28]),
        (8, 1.0, 1.0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (12, 4.0, 1.0, [0, 4, 8, 8, 8, 8, 8, 8]),
        (40, None, 1.0, [0, 1, 2, 3, 4, 5, 6, 7]),  # a clip that does not say its rate
        (40, 4.0, 0.0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (3, 0.5, 1.0, [0, 1, 2, 2, 2, 2, 2, 2]),
    ],
)
def test_eight_frames_at_one_a_second(stored: int, fps: float | None, wanted: float, expected: list[int]) -> None:
    spec = DatasetSpec(name="d", shards=["x"], batch_size=1, max_frames=8, frame_rate=wanted, crop="start")
    clip = Image(tuple(range(stored)), fps)
    assert clip_frames(clip, spec, np.random.default_rng(0)) == expected
    spec.crop = "random"
    starts = {clip_frames(clip, spec, np.random.default_rng(n))[0] for n in range(600)}
    reach = expected[-1] + 1
    assert starts == set(range(stored - reach + 1)) if stored > reach + 3 else starts == {0}


def test_the_longer_side_fits_and_the_rest_is_the_mean() -> None:
    transform = ImageTransform(20, mean=(0.5, 0.25, 0.0), mode="pad_mean")
    square = transform(torch.full((3, 10, 40), 200, dtype=torch.uint8))
    assert square.shape == (3, 20, 20)
    assert square[:, 0, 0].tolist() == [128, 64, 0]
    assert square[:, 10].unique().tolist() == [200]
    assert (square[0] == 200).sum() == 5 * 20


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40) | st.sampled_from(["<eos>", "<image> x", "<pad><|endofchunk|>"]))
def test_the_quick_encoder_is_the_processors(text: str) -> None:
    quick = quick_encoder(PROCESSOR.tokenizer, PROCESSOR.encode_text)
    assert quick != PROCESSOR.encode_text
    if text.isascii() or not any(0xD800 <= ord(c) < 0xE000 for c in text):
        assert quick(text) == pickle.loads(pickle.dumps(quick))(text) == PROCESSOR.encode_text(text)


def test_a_tokenizer_that_cannot_be_hurried_is_left_alone() -> None:
    def shouting(text: str) -> list[int]:
        return [ord(c) for c in text.upper()]

    assert quick_encoder(byte_tokenizer(), shouting) is shouting
    assert quick_encoder(object(), shouting) is shouting


def test_a_loss_is_divided_by_labels_or_by_samples() -> None:
    def divisor(labels: float, **options: Any) -> float:
        return DatasetSpec(name="d", shards=["x"], batch_size=64, **options).divisor(labels)

    assert divisor(1000.0) == 1000.0
    assert divisor(0.0) == 1.0
    assert divisor(1000.0, reduction="sequence_sum") == 64.0


def preset(name: str) -> dict[str, DatasetSpec]:
    return {spec.name: spec for spec in dataset_specs("data", compose([f"data={name}"]).data.datasets, [])}


def test_the_presets_say_what_the_papers_do() -> None:
    flamingo, fast, openflamingo = preset("flamingo"), preset("fast"), preset("openflamingo")
    assert preset("paper") == flamingo
    facts = [(s.batch_size, s.weight, s.max_tokens, s.max_images, s.max_frames) for s in flamingo.values()]
    assert facts == [(256, 1.0, 256, 5, 1), (512, 0.2, 32, 1, 1), (512, 0.2, 64, 1, 1), (64, 0.03, 64, 1, 8)]
    assert [s.next_image_probability for s in flamingo.values()] == [0.5, 0.0, 0.0, 0.0]
    assert [s.space_probability for s in flamingo.values()] == [0.0, 0.5, 0.5, 0.5]
    assert {s.reduction for s in flamingo.values()} == {"sequence_sum"}
    assert {s.crop for s in flamingo.values()} == {"random"}
    assert flamingo["vtp"].frame_rate == 1.0
    assert compose(["model=flamingo_3b"]).model.vision.resize_mode == "pad_mean"
    assert [s.pack for s in flamingo.values()] == [0] * 4
    assert {(s.pack, s.reduction) for s in fast.values()} == {(256, "token_mean")}
    assert [s.max_tokens for s in fast.values()] == [s.max_tokens for s in flamingo.values()]
    assert [(s.weight, s.labels, s.max_images) for s in openflamingo.values()] == [
        (1.0, "openflamingo", 6),
        (0.2, "text", 1),
    ]
    assert [s.single_image_share for s in openflamingo.values()] == [0.5, 1.0]
    assert [{s.colour for s in specs.values()} for specs in (flamingo, fast, openflamingo)] == [{0.2}, {0.0}, {0.0}]
