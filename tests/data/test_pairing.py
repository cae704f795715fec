"""Every sentence sees its own image: a property that holds here and fails for open_flamingo's own function."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from data.batches.tokenize import SpecialTokens, make_row, tokenize_document
from data.shards.document import Document, Image
from data.shards.mmc4 import interleave, read_document
from tests.data.sources import mmc4_document
from tests.fixtures import encoded, png


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[str], list[tuple[int, bool]]]:
    """Sentences, and for each listed image its sentence and whether it was found."""
    count = draw(st.integers(1, 6))
    sentences = [f"sentence {number}." for number in range(count)]
    places = st.tuples(st.integers(0, count - 1), st.integers(0, 3).map(bool))
    return sentences, draw(st.lists(places, min_size=1, max_size=6))


SPECIAL = SpecialTokens(image=1000, eoc=1001, eos=1002, pad=1003)


def seen_images(document: Document) -> dict[str, int]:
    """By sentence, the brightness of the image that its tokens see, through the loader's own functions; 0: none."""
    words: list[str] = []

    def encode(text: str) -> list[int]:
        words.extend(text.split())
        return list(range(len(words) - len(text.split()), len(words)))

    tokens = tokenize_document(document.nodes, encode, SPECIAL)
    row = make_row(tokens, SPECIAL, max_tokens=200, max_images=10)
    seen = {}
    for token, phi in zip(row.ids.tolist(), row.phi.tolist(), strict=True):
        if token < SPECIAL.image and words[token].endswith("."):
            image = row.images[phi - 1] if phi else None
            seen[f"sentence {words[token]}"] = value(document.images[image.frames[0]]) if image else 0
    return seen


def value(image: bytes) -> int:
    with PILImage.open(io.BytesIO(image)) as opened:
        return int(np.asarray(opened)[0, 0, 0])


def expected(sentences: list[str], images: list[tuple[int, bool]]) -> dict[str, int]:
    """What each sentence must see: the last found image of the nearest sentence at or before it that has any."""
    current, seen = 0, {}
    for number, sentence in enumerate(sentences):
        own = [10 * (k + 1) for k, (place, found) in enumerate(images) if place == number and found]
        current = own[-1] if own else current
        seen[sentence] = current
    return seen


@settings(max_examples=200, deadline=None)
@given(documents())
def test_every_sentence_sees_its_own_image(drawn: tuple[list[str], list[tuple[int, bool]]]) -> None:
    sentences, images = drawn
    body = mmc4_document(sentences, *((f"{k}.png", place, 0.3) for k, (place, _) in enumerate(images)))
    parsed, listed = read_document(body)
    kept = [(one.sentence, png(10 * (k + 1))) for k, one in enumerate(listed) if images[k][1]]
    nodes, bodies, places = interleave(parsed, kept)
    document = Document("", nodes, bodies)
    assert seen_images(document) == expected(sentences, images)
    shown = [node.frames[0] for node in document.nodes if isinstance(node, Image)]
    assert shown == list(range(len(kept)))
    assert places == sorted(place for place, _ in kept)


# --- the same property, asked of open_flamingo 2.0.1's own function -------------------------------------------------


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    """open_flamingo.train.data, loaded from its file: it imports its neighbour as a top-level module."""
    spec = importlib.util.find_spec("open_flamingo")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "train"
    sys.path.insert(0, str(folder))
    limit = PILImage.MAX_IMAGE_PIXELS
    try:
        module_spec = importlib.util.spec_from_file_location("peer_data", folder / "data.py")
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
        PILImage.MAX_IMAGE_PIXELS = limit
    return module


class WordTokenizer:
    """What open_flamingo asks of a tokenizer, over words, under transformers 4's names."""

    eos_token = "<eos>"
    additional_special_tokens = ("<image>",)
    additional_special_tokens_ids = (1,)
    padding_side = "right"

    def __init__(self) -> None:
        self.words = ["<pad>", "<image>"]

    def __call__(self, text: str, max_length: int, **_: Any) -> dict[str, torch.Tensor]:
        for mark in ("<image>", "<|endofchunk|>", "<eos>"):
            text = text.replace(mark, f" {mark} ")
        ids = []
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
            ids.append(self.words.index(word))
        ids = (ids + [0] * max_length)[:max_length]
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, max_length)}


def seen_by_peer(peer: ModuleType, sentences: list[str], images: list[tuple[int, bool]]) -> dict[str, int]:
    """By sentence, the brightness of the image that it is trained with."""
    body = mmc4_document(sentences, *((f"{k}.png", place, 0.3) for k, (place, _) in enumerate(images)))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for k, info in enumerate(body["image_info"]):
        noise[:1] = 10 * (k + 1)  # the first row tells which image it is; noise takes it over the 10 kB it asks for
        info["image_base64"] = base64.b64encode(encoded(PILImage.fromarray(noise), "PNG")).decode()
    tokenizer = WordTokenizer()

    def first_row(image: PILImage.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image)[:1, :1].copy()).permute(2, 0, 1).float()

    tensors, (ids, _) = peer.preprocess_interleaved(
        [json.dumps(body)], tokenizer, first_row, sim_threshold=0.24, min_num_images=1, max_num_images=6
    )
    seen, place = {}, 0
    words = [tokenizer.words[token] for token in ids[0].tolist()]
    for word in words:
        place += word == "<image>"
        if word.endswith(".") and word[:-1].isdigit():
            seen[f"sentence {word}"] = int(tensors[place - 1, 0, 0, 0]) if place else 0
    return seen


def test_open_flamingos_function_fails_the_property(peer: ModuleType) -> None:
    ordered = (["sentence 0.", "sentence 1."], [(0, True), (1, True)])
    assert seen_by_peer(peer, *ordered) == expected(*ordered)  # in the order of the text it is right
    readme = (["sentence 0.", "sentence 1.", "sentence 2."], [(2, True), (1, True)])
    assert expected(*readme) == {"sentence 0.": 0, "sentence 1.": 20, "sentence 2.": 10}
    assert seen_by_peer(peer, *readme) == {"sentence 0.": 0, "sentence 1.": 10, "sentence 2.": 20}

    wrong = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        count = int(random.integers(2, 7))
        places = random.permutation(6)[:count]
        drawn = ([f"sentence {n}." for n in range(6)], [(int(place), True) for place in places])
        wrong += seen_by_peer(peer, *drawn) != expected(*drawn)
        body = mmc4_document(drawn[0], *((f"{k}.png", place, 0.3) for k, (place, _) in enumerate(drawn[1])))
        sentences, listed = read_document(body)
        nodes, images, _ = interleave(sentences, [(one.sentence, png(10 * (k + 1))) for k, one in enumerate(listed)])
        document = Document("", nodes, images)
        assert seen_images(document) == expected(*drawn)
    assert wrong > 40  # of 60; a random order of several images is nearly always not that of the text
