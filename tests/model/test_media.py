from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo.errors import UserError
from flamingo.layers.media_mask import image_table, phi_from_ids, segments_from_slots, slots_from_phi
from tests.model.tiny import visibility

IMAGE = 9


def test_worked_rows() -> None:
    ids = torch.tensor([[1, IMAGE, 2, 3, IMAGE, 4, 5]])
    assert phi_from_ids(ids, IMAGE).tolist() == [[0, 1, 1, 1, 2, 2, 2]]
    assert phi_from_ids(ids, IMAGE, attend="next").tolist() == [[1, 1, 2, 2, 2, 0, 0]]
    assert phi_from_ids(ids, IMAGE, seen=torch.tensor([3])).tolist() == [[3, 4, 4, 4, 5, 5, 5]]
    assert visibility(torch.tensor([[0, 1, 1, 2]]), 2).int().tolist() == [[[0, 0], [1, 0], [1, 0], [0, 1]]]
    assert image_table(torch.tensor([2, 0, 1])).tolist() == [[0, 1], [-1, -1], [2, -1]]
    assert slots_from_phi(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[3, 4, -1]])).tolist() == [[-1, 3, 3, 4]]
    segments = segments_from_slots(torch.tensor([[-1, 0, 0, 2]]), 3)
    assert segments.tokens.tolist() == [1, 2, 3]
    assert segments.images.tolist() == [0, 2]
    assert segments.lengths == [2, 1]
    assert segments.pad.tolist() == [[0, 1], [2, 2]]
    assert segments.unpad.tolist() == [0, 1, 2]
    pieces = segments_from_slots(torch.tensor([[0] * 9 + [1]]), 2)
    assert pieces.images.tolist() == [0, 0, 1]
    assert pieces.lengths == [5, 4, 1]


def test_unknown_attend() -> None:
    with pytest.raises(UserError, match="previous"):
        phi_from_ids(torch.zeros(1, 2, dtype=torch.long), IMAGE, attend="all")


def slow_phi(row: list[bool], attend: str) -> list[int]:
    """The definition, token by token."""
    out = []
    for place, is_image in enumerate(row):
        before = sum(row[: place + 1])
        if attend == "previous" or is_image:
            out.append(before)
        else:
            out.append(before + 1 if any(row[place:]) else 0)
    return out


rows = st.integers(1, 12).flatmap(
    lambda length: st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=4)
)


@given(rows, st.sampled_from(["previous", "next"]))
@settings(max_examples=60, deadline=None)
def test_phi_is_the_slow_one(is_image: list[list[bool]], attend: str) -> None:
    ids = torch.tensor(is_image).long() * IMAGE
    assert phi_from_ids(ids, IMAGE, attend=attend).tolist() == [slow_phi(row, attend) for row in is_image]


@given(rows, st.data())
@settings(max_examples=60, deadline=None)
def test_segments_hold_every_token_that_sees_a_image_once(is_image: list[list[bool]], data: st.DataObject) -> None:
    """Any phi, whatever made it: too high numbers see nothing, and each token is under its own image."""
    counts = torch.tensor([sum(row) for row in is_image])
    top = int(counts.max()) + 1
    phi = torch.tensor([[data.draw(st.integers(0, top)) for _ in row] for row in is_image])
    slots = slots_from_phi(phi, image_table(counts))
    expected = {}
    first = 0
    for b, row in enumerate(phi.tolist()):
        for t, number in enumerate(row):
            if 0 < number <= int(counts[b]):
                expected[b * phi.shape[1] + t] = first + number - 1
        first += int(counts[b])
    segments = segments_from_slots(slots, int(counts.sum()))
    owners = [p for p, n in zip(segments.images.tolist(), segments.lengths, strict=True) for _ in range(n)]
    assert dict(zip(segments.tokens.tolist(), owners, strict=True)) == expected
    assert segments.sees.flatten().nonzero()[:, 0].tolist() == sorted(expected)
    if expected:
        assert torch.equal(segments.pad.flatten()[segments.unpad], torch.arange(len(expected)))
        mask = visibility(phi, max(top, 1)).any(-1)
        assert bool((segments.sees <= mask).all())


def test_beams_share_their_prompts_images() -> None:
    phi = torch.tensor([[1], [2], [1], [1]])
    assert slots_from_phi(phi, torch.tensor([[0, 1], [2, -1]])).tolist() == [[0], [1], [2], [2]]
