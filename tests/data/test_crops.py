"""Rows: tokens, who sees what, and what is in the loss, against a reading of the rules one token at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches.tokenize import IGNORED, CachedEncoder, SpecialTokens, TokenRow, make_row, tokenize_document
from data.shards.document import Image, Node, Text
from flamingo.layers.media_mask import phi_from_ids

SPECIAL = SpecialTokens(image=1000, eoc=1001, eos=1002, pad=1003)
BOS = SpecialTokens(image=1000, eoc=1001, eos=1002, pad=1003, bos=1004)


def encode(text: str) -> list[int]:
    return list(text.encode())


def row_of(nodes: list[Node], special: SpecialTokens = SPECIAL, **options: object) -> TokenRow:
    options = {"max_tokens": 256, "max_images": 5} | options
    return make_row(tokenize_document(nodes, encode, special), special, **options)  # type: ignore[arg-type]


def test_worked_example() -> None:
    row = row_of([Image((0,)), Text("a"), Text("k"), Image((1,)), Text("b")])
    assert row.ids.tolist() == [1000, 97, 107, 1001, 1000, 98, 1001, 1002]
    assert row.phi.tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    assert row.labels.tolist() == [IGNORED, 97, 107, 1001, IGNORED, 98, 1001, 1002]
    following = row_of([Image((0,)), Text("a"), Text("k"), Image((1,)), Text("b")], next_image_probability=1.0)
    assert following.phi.tolist() == [1, 2, 2, 2, 2, 0, 0, 0]
    assert following.ids.tolist() == row.ids.tolist()


def test_text_first_no_text_and_no_images() -> None:
    assert row_of([Text("ab"), Image((0,)), Text("c")]).phi.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert row_of([Image((0,)), Image((1,))]).ids.tolist() == [1000, 1001, 1000, 1001, 1002]
    alone = row_of([Text("ab")])
    assert alone.ids.tolist() == [97, 98, 1001, 1002]
    assert alone.images == []
    assert alone.phi.tolist() == [0] * 4


def test_bos_begins_every_row_and_counts_as_a_token() -> None:
    nodes: list[Node] = [Text("abcdefgh"), Image((0,)), Text("xy")]
    for draw in (0.0, 0.5, 0.99):
        row = row_of(nodes, BOS, max_tokens=6, draws=(draw, 0.5))
        assert row.ids[0] == 1004
        assert len(row.ids) <= 6
        assert row.labels[0] == IGNORED


def test_text_out_of_the_loss_takes_its_end_mark_with_it() -> None:
    nodes: list[Node] = [Image((0,)), Text("q", loss=False), Text("a"), Image((1,)), Text("q", loss=False)]
    row = row_of(nodes)
    assert row.labels.tolist() == [IGNORED, IGNORED, 97, 1001, *[IGNORED] * 4]


def test_openflamingo_labels() -> None:
    row = row_of([Text("x"), Image((0,)), Text("a"), Image((1,)), Text("b")], labels="openflamingo")
    #                                x  <EOC>    <image>  a  <EOC>  <image>   b  <EOC>  <eos>
    assert row.labels.tolist() == [IGNORED, IGNORED, IGNORED, 97, 1001, IGNORED, 98, 1001, IGNORED]


def test_special_words_in_a_text_stay_text() -> None:
    row = row_of([Text("<image><|endofchunk|>")])
    assert row.images == []
    assert row.ids.tolist() == [*b"<image><|endofchunk|>", 1001, 1002]


def test_a_row_ends_before_the_first_image_too_many() -> None:
    nodes = [node for k in range(4) for node in (Image((k,)), Text("t"))]
    row = row_of(nodes, max_images=2)
    assert row.ids.tolist() == [1000, 116, 1001, 1000, 116, 1001]
    assert row.images == [Image((0,)), Image((1,))]
    assert row_of(nodes, max_images=0).ids.tolist() == []


NODES = st.lists(
    st.one_of(
        st.builds(Text, st.text("abc", max_size=6), st.booleans()),
        st.builds(lambda frame: Image((frame,)), st.integers(0, 9)),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(
    nodes=NODES,
    max_tokens=st.integers(3, 40),
    max_images=st.integers(1, 5),
    crop=st.sampled_from(["random", "start"]),
    draws=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
    p_next=st.sampled_from([0.0, 0.5, 1.0]),
    special=st.sampled_from([SPECIAL, BOS]),
)
def test_rows_against_the_rules(
    nodes: list[Node],
    max_tokens: int,
    max_images: int,
    crop: str,
    draws: tuple[float, float],
    p_next: float,
    special: SpecialTokens,
) -> None:
    document = tokenize_document(nodes, encode, special)
    row = make_row(
        document,
        special,
        max_tokens=max_tokens,
        max_images=max_images,
        crop=crop,
        next_image_probability=p_next,
        draws=draws,
    )
    body = row.ids.tolist()[special.bos is not None :]
    assert len(row.ids) == len(row.phi) == len(row.labels) <= max_tokens
    # A run of the document's tokens; the document's images there are the row's, in their order.
    starts = [s for s in range(len(document.ids)) if document.ids[s : s + len(body)] == body]
    shown = [
        [p for position, p in zip(document.positions, document.images, strict=True) if s <= position < s + len(body)]
        for s in starts
    ]
    assert row.images in shown or not body
    assert body.count(special.image) == len(row.images) <= max_images
    if crop == "start":
        assert body == document.ids[: len(body)]
    # phi, token by token.
    see_next = draws[1] < p_next
    positions = [position for position, token in enumerate(row.ids) if token == special.image]
    for position in range(len(row.ids)):
        before = sum(image <= position for image in positions)
        if see_next and position not in positions:
            before = before + 1 if before < len(positions) else 0
        assert row.phi[position] == before
    if len(row.ids):
        ids = torch.from_numpy(row.ids)[None]
        way = "next" if see_next else "previous"
        assert torch.equal(phi_from_ids(ids, special.image, attend=way)[0], torch.from_numpy(row.phi))
    # No label on an image, none on BOS, and every other label is the token itself.
    in_loss = row.labels != IGNORED
    assert np.array_equal(row.labels[in_loss], row.ids[in_loss])
    assert not set(row.ids[in_loss].tolist()) & {special.image, special.bos}


def test_crops_reach_every_position() -> None:
    document = tokenize_document([Text("abcdefghij")], encode, SPECIAL)
    starts = {
        int(make_row(document, SPECIAL, max_tokens=4, max_images=1, draws=(draw, 0.5)).ids[0])
        for draw in np.linspace(0, 0.999, 200)
    }
    assert starts == set(b"abcdefghi")


def test_an_image_that_ends_a_crop_is_not_shown() -> None:
    nodes: list[Node] = [Text("abcd"), Image((0,)), Text("efgh")]
    row = row_of(nodes, max_tokens=6, crop="start")
    assert row.ids.tolist() == [*b"abcd", 1001]
    assert row.images == []
    following = row_of(nodes, max_tokens=6, crop="start", next_image_probability=1.0)
    assert following.phi.tolist() == [1] * 6  # here the text before it does see it


def test_the_encoder_asks_once_for_a_text() -> None:
    asked: list[str] = []

    def slow(text: str) -> list[int]:
        asked.append(text)
        return encode(text)

    cached = CachedEncoder(slow, limit=2)
    assert [cached("a"), cached("a"), cached("b"), cached("c"), cached("a")] == [[97], [97], [98], [99], [97]]
    assert asked == ["a", "b", "c", "a"]


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_share_of_rows_that_see_the_next_image(probability: float) -> None:
    nodes: list[Node] = [Text("a"), Image((0,)), Text("b")]
    rows = [row_of(nodes, next_image_probability=probability, draws=(0.0, draw)) for draw in np.linspace(0, 0.999, 100)]
    assert sum(int(row.phi[0]) for row in rows) == pytest.approx(100 * probability, abs=1)
