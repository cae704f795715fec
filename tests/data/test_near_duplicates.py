"""Near duplicates: exact counts on planted sets, the neighbours that must stay, and the same as comparing all pairs."""

from __future__ import annotations

import io
import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from PIL import ImageFilter

from data.prepare.web.near_duplicates import (
    LEAST_BITS,
    UNSEEN,
    alike_looks,
    alike_texts,
    image_look,
    text_signature,
)
from data.shards.document import Document, Image, Text
from tests.data.sources import command, flat, jpeg, prepare, refusal
from tests.data.test_prepare_deduplicate import document, write
from tests.data.test_prepare_engine import files

VOCABULARY = [f"word{n}" for n in range(3000)]


def article(seed: int, words: int = 200) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=words)


def changed(words: list[str], *at: int) -> str:
    """A text in which some words are others: each takes five shingles of the text with it."""
    return " ".join("changed" if n in at else word for n, word in enumerate(words))


def texts(*parts: str) -> list[Document]:
    return [document(n, part) for n, part in enumerate(parts)]


def test_planted_texts_are_found_and_counted_and_no_other(tmp_path: Path) -> None:
    """30 articles; 10 of them have copies with one, two or no words changed and other spelling, before and after."""
    parts: list[str] = []
    for seed in range(30):
        words = article(seed)
        if seed < 10:
            parts += [changed(words, 50), " ".join(words).upper().replace(" ", ",\n"), changed(words, 20, 150)]
        parts.append(" ".join(words) if seed < 10 else " ".join(words[:100] + article(100 + seed, 100)))
        if 10 <= seed < 20:  # half of it is the other's: not a near duplicate
            parts.append(" ".join(words[:100] + article(200 + seed, 100)))
    folder = write(tmp_path / "in", *texts(*parts), per_shard=7)
    done = prepare(tmp_path / "out", "deduplicate", folder, "--near-text", 0.8)
    assert done.dropped == {"text nearly that of a later document": 30}
    assert len(done.documents) == 40
    last = [one for one in done.documents if flat(one)[1] in {" ".join(article(seed)) for seed in range(10)}]
    assert len(last) == 10  # of each ten the last of its four
    assert len(prepare(tmp_path / "all", "deduplicate", folder).documents) == 70


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A cat.", "a  CAT", True),
        ("A cat.", "A dog.", False),
        ("一只猫坐在窗台上看着外面的雨天和路上的行人", "一只猫坐在窗台上看着外面的雨天和路上的行人。", True),
        ("一只猫坐在窗台上看着外面的雨天", "两只狗在公园里追着一个红色的球", False),
        ("ｆｕｌｌ width words are the same words", "full width words are the same words", True),
        ("नमस्ते दुनिया यह एक लंबा वाक्य है", "नमस्ते दुनिया यह एक लंबा वाक्य है", True),
        ("half a surrogate \ud800 is text too", "half a surrogate \ud800 is text too", True),
    ],
)
def test_words_of_any_script(one: str, other: str, same: bool) -> None:
    signatures = [text_signature(Document("", [Text(text)], [])) for text in (one, other)]
    assert all(signature is not None for signature in signatures)
    lasts = alike_texts(np.array(signatures), 0.8)
    assert (lasts.tolist() == [1, 1]) is same


def test_documents_without_a_word_are_not_each_others() -> None:
    assert text_signature(Document("", [Text(" ... \n")], [])) is None
    assert text_signature(Document("", [], [])) is None
    assert alike_texts(np.empty((0, 128), np.uint32), 0.8).tolist() == []


def look_of(image: PILImage.Image, form: str = "PNG", **options: int) -> bytes:
    body = io.BytesIO()
    image.save(body, form, **options)
    return body.getvalue()


def scene(seed: int) -> PILImage.Image:
    """Smooth blobs of light: what a photograph is to a perceptual hash."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return PILImage.fromarray(noise).resize((160, 120), PILImage.Resampling.BICUBIC)


def copies(image: PILImage.Image) -> list[bytes]:
    return [
        look_of(image.resize((320, 240), PILImage.Resampling.LANCZOS)),
        look_of(image.resize((100, 75), PILImage.Resampling.LANCZOS), "JPEG", quality=80),
        look_of(image.filter(ImageFilter.GaussianBlur(1)), "WEBP", quality=70),
    ]


def test_planted_images_are_found_and_counted_and_no_other(tmp_path: Path) -> None:
    """Of 24 scenes, 6 come three more times: resized, in other formats, blurred; each document has another text."""
    images = [body for seed in range(24) for body in (copies(scene(seed)) if seed < 6 else [])]
    images += [look_of(scene(seed)) for seed in range(24)]
    made = [Document("", [Image((0,)), Text(f"Text {n}.")], [image]) for n, image in enumerate(images)]
    folder = write(tmp_path / "in", *made, per_shard=5)
    done = prepare(tmp_path / "out", "deduplicate", folder, "--near-images", 4)
    assert done.dropped == {"images of a later document": 18}
    assert [one.images[0] for one in done.documents] == images[18:]
    assert len(prepare(tmp_path / "all", "deduplicate", folder).documents) == 42


def test_a_logo_in_other_sizes_is_an_image_of_too_many_documents(tmp_path: Path) -> None:
    logos = [look_of(scene(0).resize((80 + n, 60 + n), PILImage.Resampling.LANCZOS)) for n in range(11)]
    made = [
        Document("", [Image((0,)), Text(f"T {n}."), Image((1,))], [logo, look_of(scene(n + 1))])
        for n, logo in enumerate(logos)
    ]
    made.append(Document("", [Image((0,)), Text("Twice."), Image((1,))], [look_of(scene(50)), *copies(scene(50))[:1]]))
    folder = write(tmp_path / "in", *made)
    done = prepare(tmp_path / "out", "deduplicate", folder, "--near-images", 4)
    assert done.dropped_images == {"image of too many documents": 11, "image of the same document again": 1}
    assert [one.images for one in done.documents] == [[look_of(scene(n + 1))] for n in range(11)] + [
        [look_of(scene(50))]
    ]
    assert prepare(tmp_path / "all", "deduplicate", folder).dropped_images == {}


def test_frames_of_a_clip_that_look_alike_stay_as_they_are(tmp_path: Path) -> None:
    frames = [look_of(scene(0)), *copies(scene(0))]
    one = Document("", [Image((0, 1, 2, 3), 2.0), Text("A clip.")], frames)
    (left,) = prepare(tmp_path / "out", "deduplicate", write(tmp_path / "in", one), "--near-images", 4).documents
    assert (left.images, left.nodes) == (frames, one.nodes)


def test_what_shows_nothing_or_cannot_be_decoded_is_like_no_other() -> None:
    assert image_look(look_of(PILImage.new("RGB", (64, 64), "red"))) == UNSEEN
    assert image_look(look_of(PILImage.new("L", (64, 64), 200))) == UNSEEN
    assert image_look(jpeg(0)[:200]) == UNSEEN
    assert image_look(look_of(scene(1))).bit_count() >= LEAST_BITS


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=12, unique=True), st.integers(0, 8), st.data())
def test_hashes_are_grouped_as_by_comparing_all_pairs(values: list[int], bits: int, data: st.DataObject) -> None:
    flips = data.draw(st.lists(st.tuples(st.sampled_from(values), st.sets(st.integers(0, 63), max_size=9)), max_size=8))
    looks = sorted({*values, *(value ^ sum(1 << bit for bit in some) for value, some in flips)})
    group = list(range(len(looks)))
    for a, b in combinations(range(len(looks)), 2):
        if (looks[a] ^ looks[b]).bit_count() <= bits:
            old, new = sorted((group[a], group[b]))
            group = [new if value == old else value for value in group]
    assert alike_looks(np.array(looks, np.uint64), bits).tolist() == group


def test_parts_and_a_second_run_write_the_same_bytes(tmp_path: Path) -> None:
    made = [document(n, changed(article(n // 3), n % 3)) for n in range(12)]
    folder = write(tmp_path / "in", *made, per_shard=2)
    options = ("--near-text", 0.8, "--near-images", 4)
    done = prepare(tmp_path / "whole", "deduplicate", folder, *options)
    assert done.dropped == {"text nearly that of a later document": 8}
    assert command("prepare", "dedupe", folder, "--out", tmp_path / "again", "--workers", 1, *options)[0] == 0
    assert files(tmp_path / "again") == files(tmp_path / "whole")
    for part in (2, 1):
        shared = ("--part", f"{part}/2", "--counts", tmp_path / "counts")
        out = ("--out", tmp_path / "parts", "--workers", 1)
        assert command("prepare", "dedupe", folder, *out, *shared, *options)[0] == 0
    assert command("merge", tmp_path / "parts")[0] == 0
    merged = {name: body for name, body in files(tmp_path / "parts").items() if not name.startswith("_part")}
    assert merged == files(tmp_path / "whole")
    # counts without signatures are other files, so that a later run with other options is not misled
    plain = ("--counts", tmp_path / "counts", "--workers", 1)
    assert command("prepare", "dedupe", folder, "--out", tmp_path / "plain", *plain)[0] == 0
    assert len(list((tmp_path / "counts").iterdir())) == 12


def test_mistakes(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", document(0, "x"))
    assert "--near-text 0.1 must be from 0.3 to 1" in refusal(tmp_path / "o", "deduplicate", folder, "--near-text", 0.1)
    assert "must be from 0 to 8" in refusal(tmp_path / "o", "deduplicate", folder, "--near-images", 9)
