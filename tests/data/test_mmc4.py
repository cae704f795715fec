"""open_flamingo's MMC4 shards in place: every image beside its own sentence, where its own loader mixes them up."""

from __future__ import annotations

import base64
import io
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from data.batches.collate import FlamingoCollate
from data.dataset import DatasetSpec
from data.errors import ContentError
from data.loading.loader import MixLoader
from data.shards.document import Image, Text
from data.shards.mmc4 import MATCHING, Mmc4Rule, is_mmc4, mmc4_document, read_document
from tests.data.helpers import byte_processor
from tests.data.test_index import make_tar
from tests.fixtures import byte_tokenizer, encoded, png

ALL = Mmc4Rule(similarity=-1.0, smallest=0)


def line(positions: list[int], sentences: int, **options: Any) -> dict[str, Any]:
    """Image n has brightness 20 n and belongs to sentence places[n], whose text says so."""
    texts = ["no image"] * sentences
    matrix = np.full((len(positions), sentences), 0.1)
    infos = []
    for number, position in enumerate(positions):
        value = 20 * number + 20
        noisy = np.random.default_rng(number).integers(-3, 4, (120, 120, 3)) + value  # 10 kB at least, as it wants
        image = PILImage.fromarray(noisy.astype(np.uint8))
        texts[position] = str(value)
        matrix[number, position] = 0.3
        infos.append({"image_name": f"{number}.png", "image_base64": base64.b64encode(encoded(image, "PNG")).decode()})
        infos[-1] |= options
    return {"text_list": texts, "image_info": infos, "similarity_matrix": matrix.tolist()}


PLACES = st.integers(1, 7).flatmap(lambda n: st.permutations(range(n + 2)).map(lambda order: list(order)[:n]))


@settings(max_examples=60, deadline=None)
@given(positions=PLACES)
def test_every_image_stands_before_its_own_sentence(positions: list[int]) -> None:
    nodes, images = mmc4_document(line(positions, len(positions) + 2), ALL)
    assert len(images) == len(positions)
    for node, after in itertools.pairwise(nodes):
        if isinstance(node, Image):
            image = PILImage.open(io.BytesIO(images[node.frames[0]].decode()))
            assert isinstance(after, Text)
            assert abs(float(np.asarray(image).mean()) - float(after.text.split()[0])) < 2


def slots(ids: list[int], images: torch.Tensor, tokenizer: Any) -> list[tuple[float, float]]:
    """(brightness of the k-th image, what the text behind the k-th tag says)."""
    text = tokenizer.decode(ids)
    said = [part.split("<|endofchunk|>")[0].split()[0] for part in text.split("<image>")[1:]]
    return [(float(images[k].float().mean()), float(word)) for k, word in enumerate(said)]


def test_open_flamingos_function_pairs_them_wrongly() -> None:
    from data.bench.peer import SPECIAL, module

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    ids = tokenizer.convert_tokens_to_ids(SPECIAL)
    shim = {"additional_special_tokens": SPECIAL, "additional_special_tokens_ids": ids}
    tokenizer.__class__ = type("WithSpecialTokens", (tokenizer.__class__,), shim)
    code = module()
    random.seed(0)
    draw, wrong = np.random.default_rng(0), 0
    for _ in range(12):
        positions = draw.permutation(6)[:4].tolist()
        images, (text, _) = code.preprocess_interleaved(
            [json.dumps(line(positions, 6))],
            tokenizer,
            lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float(),
            0.24,
            1,
            4,
        )
        pairs = slots(text[0].tolist(), images, tokenizer)
        assert len(pairs) == 4
        if positions != sorted(positions):
            wrong += any(abs(shown - said) > 2 for shown, said in pairs)
        else:
            assert all(abs(shown - said) < 2 for shown, said in pairs)
    assert wrong >= 10


def test_its_shards_are_trained_on_in_place(tmp_path: Path) -> None:
    lines = [line([4, 1, 3], 5), line([0], 2), line([2, 0], 4)]
    shard = make_tar(
        tmp_path / "000000000.tar", [(f"{n:032x}.json", json.dumps(x).encode()) for n, x in enumerate(lines)]
    )
    spec = DatasetSpec(name="d", shards=[str(shard)], batch_size=3, max_images=6)
    processor = byte_processor()
    batch = next(iter(MixLoader([spec], FlamingoCollate(processor)))).batches["d"][0]
    checked = first = 0
    for row, count in enumerate(batch.tensors["image_counts"].tolist()):
        ids = batch.tensors["input_ids"][row].tolist()
        images = batch.tensors["pixel_values"][first : first + count].flatten(1)
        for shown, said in slots(ids, images, processor.tokenizer):
            assert abs(shown - said) < 2
            checked += 1
        first += count
    assert checked == 6


def test_which_images_are_kept() -> None:
    document = line([0, 1, 2], 3)
    document["image_info"][0]["image_base64"] = "b'" + document["image_info"][0]["image_base64"] + "'"
    del document["image_info"][1]["image_base64"]
    document["similarity_matrix"][2][2] = 0.2
    kept = mmc4_document(document, Mmc4Rule())[1]
    assert [image.decode()[:4] for image in kept] == [b"\x89PNG"]
    assert len(mmc4_document(document, Mmc4Rule(similarity=0.2))[1]) == 2
    with pytest.raises(ContentError, match="no image left: 3 images, none of them found"):
        mmc4_document(document, Mmc4Rule(smallest=10**9))
    matched = line([0, 1], 2, matched_text_index=0, matched_sim=0.3)
    nodes, _ = mmc4_document(matched, ALL)
    assert nodes[:2] == [Image((0,)), Image((1,))]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_list": "x"}, "'text_list' is not a list of sentences"),
        ({"image_info": [5]}, "'image_info' is not a list of objects"),
        ({"similarity_matrix": [["a", "b"]]}, "image 0 has neither a row of 2 similarities nor a matched text"),
        ({"similarity_matrix": None}, "image 0 has neither a row of 2"),
    ],
)
def test_wrong_types_are_said(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mmc4_document(line([1], 2) | change, ALL)
    with pytest.raises(ValueError, match="image 0 belongs to sentence 7 of 2"):
        mmc4_document(line([1], 2, matched_text_index=7), ALL)


def test_which_sentence_a_image_without_one_belongs_to() -> None:
    body: dict[str, Any] = {"text_list": ["A.", "B."], "image_info": [{}, {}]}
    body["similarity_matrix"] = [[0.33, 0.32], [0.34, 0.1]]  # both like A. best; one to one is better together
    assert [one.sentence for one in read_document(body)[1]] == [0, 0]
    assert [(one.sentence, one.similarity) for one in read_document(body, "assigned")[1]] == [(1, 0.32), (0, 0.34)]
    body["image_info"] = [{"matched_text_index": 1, "matched_sim": 0.5}, {"matched_text_index": 1}]
    for matching in MATCHING:  # what is listed holds in either
        assert [(one.sentence, one.similarity) for one in read_document(body, matching)[1]] == [(1, 0.5), (1, 0.1)]


def test_chatgpts_sequences_are_trained_on_in_place() -> None:
    first, second = (base64.b64encode(png(value)).decode() for value in (20, 40))
    body = {"is_gpt": 1, "example": "Hm. _!_IMAGE1_!_ A cat. _!_IMAGE2_!_ None. _!_IMAGE3_!_ A dog."}
    body |= {"image_map": {"_!_IMAGE1_!_": {"base64_image": first}, "_!_IMAGE3_!_": {"base64_image": second}}}
    assert is_mmc4(body)
    nodes, images = mmc4_document(body, Mmc4Rule())
    assert nodes == [Text("Hm."), Image((0,)), Text("A cat. None."), Image((1,)), Text("A dog.")]
    assert [image.decode() for image in images] == [png(20), png(40)]
    with pytest.raises(ContentError, match="no image left"):
        mmc4_document(body | {"image_map": {}}, Mmc4Rule())
    with pytest.raises(ValueError, match="'example' is not text"):
        mmc4_document({"is_gpt": 1}, Mmc4Rule())
