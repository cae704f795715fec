"""Prompts equal training pages, token by token, and never hide what was left out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data.batches.tokenize import SpecialTokens, tokenize_document
from data.shards.document import Image, Node, Text
from eval.demonstrations.ablations import ABLATIONS
from eval.prompting.prompts import PromptBuilder
from eval.spec import TaskSpec
from eval.task import EncodedImage, Episode
from eval.tasks.examples import ExampleTask
from flamingo.errors import UserError
from tests.eval.worlds import EOC, IMAGE, Letters, colour_examples

SPEC = TaskSpec(queries=10, lead=" ")


def episode(shots: int, **changes: object) -> Episode:
    task = ExampleTask("colours", SPEC, colour_examples(40))
    return replace(task.episode(task.query_ids()[0], shots, seed=0), **changes)  # type: ignore[arg-type]


def spelled(ids: tuple[int, ...]) -> str:
    return "".join({IMAGE: "<image>", EOC: "<eoc>"}.get(i) or chr(i) for i in ids)


def test_prompt_is_the_beginning_of_the_training_page() -> None:
    shown = episode(2)
    prompt = PromptBuilder(Letters()).build(shown, 8)
    nodes: list[Node] = []
    for number, turn in enumerate([*shown.demos, shown.query]):
        nodes += [Image((number,)), Text(turn.question, loss=False), Text(f" {turn.answer}")]
    page = tokenize_document(nodes, Letters().encode_text, SpecialTokens(image=IMAGE, eoc=EOC, eos=2, pad=0))
    assert tuple(page.ids[: len(prompt.ids)]) == prompt.ids
    assert spelled(tuple(page.ids[len(prompt.ids) : -1])) == f" {shown.golds[0]}<eoc>"


def test_candidates_carry_what_the_prompt_leaves_out_and_end_the_chunk() -> None:
    prompt = PromptBuilder(Letters()).build(episode(1, candidates=("tiger", "tiger shark", "tavi")), 8)
    assert spelled(prompt.ids).endswith("<eoc><image>what colour? t")
    assert [spelled(ids) for ids in prompt.candidates] == ["iger<eoc>", "iger shark<eoc>", "avi<eoc>"]


def test_text_that_looks_like_a_tag_stays_text() -> None:
    shown = episode(1)
    tagged = replace(shown, demos=(replace(shown.demos[0], answer="<image>"),))
    prompt = PromptBuilder(Letters()).build(tagged, 8)
    assert prompt.ids.count(IMAGE) == len(prompt.images) == 2


def test_demonstrations_that_do_not_fit_are_dropped_whole_from_the_far_end() -> None:
    shown = episode(4)
    whole = PromptBuilder(Letters()).build(shown, 8)
    room = len(whole.ids) + 8 - 1
    cut = PromptBuilder(Letters(), context=room).build(shown, 8)
    assert cut.shots_kept == 3
    assert whole.ids[-len(cut.ids) :] == cut.ids
    assert cut.images == whole.images[1:]
    alone = PromptBuilder(Letters(), context=30).build(shown, 8)
    assert (alone.shots_kept, spelled(alone.ids)) == (0, "<image>what colour?")
    with pytest.raises(UserError, match="context is 20"):
        PromptBuilder(Letters(), context=20).build(shown, 8)


def test_row_start_comes_first() -> None:
    prompt = PromptBuilder(Letters(), start=[7]).build(episode(1), 8)
    assert prompt.ids[:2] == (7, IMAGE)


def test_shuffled_permutes_all_images_and_no_text() -> None:
    shown = [episode(8), episode(8, query_id="other")]
    moved = [ABLATIONS["shuffled"](e, 0) for e in shown]
    orders = []
    for before, after in zip(shown, moved, strict=True):
        turns, others = [*before.demos, before.query], [*after.demos, after.query]
        assert [replace(t, image=None) for t in turns] == [replace(t, image=None) for t in others]
        images = [t.image for t in turns]
        orders.append([images.index(t.image) for t in others])
        assert sorted(orders[-1]) == list(range(9))
        assert orders[-1] != list(range(9))
    assert orders[0] != orders[1]
    assert ABLATIONS["shuffled"](shown[0], 0) == moved[0] != ABLATIONS["shuffled"](shown[0], 1)


def test_blank_keeps_the_size_and_text_only_keeps_the_query() -> None:
    shown = episode(2)
    blanked = ABLATIONS["blank"](shown, 0)
    assert len({turn.image for turn in [*blanked.demos, blanked.query]}) == 1
    assert shown.query.image is not None
    assert blanked.query.image == shown.query.image.blank() != shown.query.image
    bare = ABLATIONS["text_only"](shown, 0)
    prompt = PromptBuilder(Letters()).build(bare, 8)
    assert prompt.images == (shown.query.image,)
    assert spelled(prompt.ids).count("<eoc>") == 2


def test_unordered_mixes_the_frames_of_clips_and_nothing_else() -> None:
    shown = episode(1)
    orders = set()
    for number in range(8):
        clip = EncodedImage(tuple(bytes([number, frame]) for frame in range(6)))
        before = replace(shown, query=shown.query.with_images([clip]))
        after, again = ABLATIONS["unordered"](before, 0), ABLATIONS["unordered"](before, 0)
        assert [replace(turn, image=None) for turn in after.demos] == [
            replace(turn, image=None) for turn in shown.demos
        ]
        for image, still in zip(after.demos[0].images, shown.demos[0].images, strict=True):  # of one frame
            assert image.sha256 == still.sha256
        (mixed,), (same,) = after.query.images, again.query.images
        assert mixed.frames == same.frames
        assert sorted(mixed.frames) == sorted(clip.frames)
        assert (mixed.sha256 == clip.sha256) == (mixed.frames == clip.frames)
        orders.add(tuple(frame[1] for frame in mixed.frames))
    assert len(orders) > 4
    with pytest.raises(UserError, match="shows no clip of two frames or more"):
        ABLATIONS["unordered"](shown, 0)
