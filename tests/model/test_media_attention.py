"""Who sees what, on every form of the attention, against a slow oracle that is written token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flamingo.layers.attention import (
    attend_segments,
    attention_weights,
    block_diagonal_bias,
    laid_out,
)
from flamingo.layers.media_mask import (
    Segments,
    image_table,
    phi_from_ids,
    segments_from_slots,
    segments_of_rows,
    slots_from_phi,
)
from tests.model.slow_attention import attend_segments_slow, images_seen
from tests.model.tiny import visibility

IMAGE = 9
L, H, K = 2, 2, 8
MODES = ["previous", "next", "all", "given"]


def oracle(is_image: list[list[bool]], mode: str, given_phi: list[list[int]]) -> list[list[list[int]]]:
    """For every token the places in the flat stack of the images that it sees."""
    out, first = [], 0
    for row, phi in zip(is_image, given_phi, strict=True):
        number = sum(row)
        seen = []
        for place, own in enumerate(row):
            before = sum(row[: place + 1])
            if mode == "all":
                mine = list(range(1, before + 1))
            elif mode == "given":
                mine = [phi[place]]
            elif mode == "next" and not own:
                mine = [before + 1]
            else:
                mine = [before]
            seen.append([first + j - 1 for j in mine if 1 <= j <= number])
        out.append(seen)
        first += number
    return out


def grouped(is_image: list[list[bool]], mode: str, given_phi: list[list[int]]) -> tuple[Segments, int]:
    """The library's own way from ids to segments; the number of images."""
    ids = torch.tensor(is_image).long() * IMAGE
    counts = torch.tensor([sum(row) for row in is_image])
    if mode == "given":
        phi = torch.tensor(given_phi)
    else:
        phi = phi_from_ids(ids, IMAGE, attend="next" if mode == "next" else "previous")
    if mode == "all":
        return segments_of_rows(phi, image_table(counts)), int(counts.sum())
    return segments_from_slots(slots_from_phi(phi, image_table(counts)), int(counts.sum())), int(counts.sum())


rows = st.integers(1, 10).flatmap(
    lambda length: st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=4)
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[bool]], str, list[list[int]]]:
    is_image = draw(rows)
    top = max(sum(row) for row in is_image) + 1
    return is_image, draw(st.sampled_from(MODES)), [[draw(st.integers(0, top)) for _ in row] for row in is_image]


def tensors(tokens: int, images: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 100 + images)
    shapes = ((tokens, H, K), (images, L, H, K), (images, L, H, K))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)
    return q, k, v


@given(batches())
@settings(max_examples=150, deadline=None)
def test_every_form_sees_what_the_oracle_sees(batch: tuple[list[list[bool]], str, list[list[int]]]) -> None:
    """Mask, fast attention, slow twin, maps and xformers' bias: one token after the other by the definition."""
    mode = batch[1]
    expected = [seen for row in oracle(*batch) for seen in row]
    segments, number = grouped(*batch)
    tokens = segments.tokens.tolist()
    assert sorted(tokens) == [place for place, seen in enumerate(expected) if seen]
    assert segments.sees.flatten().tolist() == [bool(seen) for seen in expected]
    mask = images_seen(segments, number)
    assert [row.nonzero()[:, 0].tolist() for row in mask] == [expected[token] for token in tokens]
    if not tokens:
        return
    q, k, v = tensors(len(tokens), number)
    with torch.no_grad():
        by_hand = []
        for n, token in enumerate(tokens):
            keys, values = k[expected[token]].flatten(0, 1), v[expected[token]].flatten(0, 1)
            weights = (torch.einsum("hk,lhk->hl", q[n], keys) / K**0.5).softmax(-1)
            by_hand.append(torch.einsum("hl,lhk->hk", weights, values))
        for form in (attend_segments, attend_segments_slow):
            torch.testing.assert_close(form(q, k, v, segments), torch.stack(by_hand), rtol=0, atol=1e-12)
        maps = attention_weights(q, k, segments)
        if mode != "all":
            owned = v[[expected[token][0] for token in tokens]]
            torch.testing.assert_close(torch.einsum("nhl,nlhk->nhk", maps, owned), torch.stack(by_hand))
            bias = block_diagonal_bias(segments.lengths, L).materialize((len(tokens), len(segments.lengths) * L))
            open_ = (bias == 0).unflatten(1, (-1, L))
            assert bool((open_.all(-1) == open_.any(-1)).all())
            assert open_.all(-1).sum(1).tolist() == [1] * len(tokens)
            owner = segments.images[open_.all(-1).long().argmax(1)]
            assert torch.equal(torch.nn.functional.one_hot(owner, number).bool(), mask)


@given(batches())
@settings(max_examples=60, deadline=None)
def test_gradients_are_the_slow_twins(batch: tuple[list[list[bool]], str, list[list[int]]]) -> None:
    segments, number = grouped(*batch)
    if not segments.lengths:
        return
    inputs = tensors(len(segments.tokens), number)
    outs = [form(*inputs, segments) for form in (attend_segments, attend_segments_slow)]
    weight = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), inputs) for out in outs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_worked_rows_of_all_previous() -> None:
    phi = torch.tensor([[0, 1, 1, 2]])
    assert visibility(phi, 2, all_previous=True).int().tolist() == [[[0, 0], [1, 0], [1, 0], [1, 1]]]
    segments = segments_of_rows(phi, torch.tensor([[3, 4, -1]]))
    assert segments.tokens.tolist() == [1, 2, 3]
    assert segments.lengths == [3]
    assert segments.reach is not None
    assert segments.upto is not None
    assert segments.reach.tolist() == [[3, 4, -1]]
    assert segments.upto.tolist() == [[1, 1, 2]]


@pytest.mark.parametrize("all_previous", [False, True])
def test_maps_are_laid_out_over_the_text(all_previous: bool) -> None:
    """Each seeing token's weights sum to 1 over what it sees, in the token's place; the others' are zero."""
    phi, table = torch.tensor([[0, 1, 2], [0, 0, 1]]), torch.tensor([[0, 1], [2, -1]])
    if all_previous:
        segments, width = segments_of_rows(phi, table), 2 * L
    else:
        segments, width = segments_from_slots(slots_from_phi(phi, table), 3), L
    q, k, _ = tensors(len(segments.tokens), 3)
    (maps,) = laid_out([attention_weights(q, k, segments).detach()], segments, 1, width)
    assert maps.shape == (2, H, 3, width)
    torch.testing.assert_close(maps.sum(-1), (phi > 0)[:, None].expand(-1, H, -1).double())
    if all_previous:
        assert bool((maps[0, :, 1, L:] == 0).all())
        assert bool((maps[0, :, 2] > 0).all())
        assert bool((maps[1, :, :, L:] == 0).all())
    assert [m.shape for m in laid_out([], segments, 2, width)] == [(2, 1, 3, width)] * 2
