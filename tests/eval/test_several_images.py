"""Questions about several images, and open questions among closed ones: MMMU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from eval.demonstrations.ablations import ABLATIONS
from eval.demonstrations.samplers import leak
from eval.metrics.text import open_match
from eval.prompting.prompts import PromptBuilder
from eval.reports.gallery import figures_of
from eval.reports.results import rows_of, sample_line, sample_of
from eval.runner import Grid, run
from eval.task import EncodedImage, Episode, Example, Turn
from eval.tasks.examples import ExampleTask
from eval.tasks.formats.interleaved import interleaved, without_first_mark
from tests.eval.test_protocols import built, text
from tests.eval.worlds import COLOURS, Constant, Letters
from tests.fixtures import png

IMAGES = [EncodedImage((png(COLOURS["red"], 900 + number),)) for number in range(4)]


def placed(question: str, count: int) -> str:
    """Where the images stand, as `#1`, in the text."""
    first, before, more = interleaved(question, {"image": None, "images": IMAGES[:count]})
    assert first == IMAGES[0]
    return f"#1{before}" + "".join(f"#{IMAGES.index(image) + 1}{behind}" for image, behind in more)


def test_images_stand_where_they_are_named_first() -> None:
    assert placed("What is it?", 1) == "#1What is it?"
    assert placed("What does <image 1> show?", 1) == "#1What does the image show?"
    assert placed("Is <image 1> left of <image 2>?", 2) == "#1Is image 1 left of #2?"
    assert placed("Is it?\nA. <image 3>\nB. <image 2>, <image 3>", 3) == "#1Is it?\nA. #3\nB. #2, image 3"
    assert placed("Which?", 3) == "#1#2#3Which?"
    assert placed("Which is <image 3>?", 3) == "#1#2Which is #3?"
    assert placed("Where is <image 9>?", 2) == "#1#2Where is image 9?"
    assert without_first_mark("<image 1> What?") == without_first_mark("What? <image 1>") == "What?"


def episodes(tmp_path: Path, *settings: str) -> dict[str, Episode]:
    task = built(tmp_path, "mmmu", *settings)
    return {query.rsplit("_", 1)[1]: task.episode(query, 1, 0) for query in task.query_ids()}


def test_mmmu_asks_about_all_its_images_and_generates_open_answers(tmp_path: Path) -> None:
    found = episodes(tmp_path)
    several = text(replace(found["1"], demos=()))
    # The tokens that all candidates share are in the prompt; images and options as the text names them.
    assert several == "#Question: Is image 1 left of #?\nA. no\nB. #\nC. as image 2\nAnswer: "
    assert len(set(found["1"].query.images)) == 3
    assert found["1"].candidates == ("A", "B", "C")
    opened = found["3"]
    assert (opened.candidates, opened.golds) == ((), ("1,250.50", "a lot"))
    assert text(replace(opened, demos=())) == "#Question: What is it?\nAnswer:"
    flamingo = episodes(tmp_path, "protocol=flamingo")["1"]
    assert flamingo.candidates == ("no", "image 3", "as image 2")
    assert text(replace(flamingo, demos=())) == "##Question: Is image 1 left of #? Answer: "
    closed = episodes(tmp_path, "+task.mmmu.source.only={question_type: multiple-choice}")
    assert "3" not in closed


def test_open_and_closed_answers_are_scored_each_in_its_way(tmp_path: Path) -> None:
    task = built(tmp_path, "mmmu")
    grid = Grid([0, 2], [0], ["real", "shuffled", "blank", "text_only"])
    samples, cache = run({"mmmu": task}, grid, Constant("about 1250.5 dollars"))
    opened = [sample for sample in samples if sample.query_id.endswith("_3")]
    assert [sample.score for sample in opened] == [1.0] * len(opened)
    assert {sample.score for sample in samples if not sample.log_probs} == {1.0}
    assert {sample.score for sample in samples if sample.log_probs} == {0.0}  # ranked: always A
    (row, *_) = rows_of(samples, {"mmmu": task})
    assert row["chance"] == pytest.approx((4 / 2 + 1 / 3) / 6)
    for sample in samples:
        assert sample.prompt.count("<image>") == len(sample.images_sha256)
        assert sample_of(sample_line(sample)) == sample
        with pytest.raises(KeyError):
            sample_of({key: value for key, value in sample_line(sample).items() if key != "ended"})
        figures = figures_of(sample)  # in the gallery every image has a place of its own, with its own text
        assert [image for image, _, _ in figures if image is not None] == list(sample.images_sha256)
        said = "".join(text for _, text in sample.turns)
        assert "".join(text for _, text, _ in figures) == said.replace("<image>", "")
        assert sum(is_query for *_, is_query in figures) == 1 + sample.turns[-1][1].count("<image>")
    assert cache.shown == sum(len(sample.images_sha256) for sample in samples)


def test_a_text_that_has_the_image_word_of_its_own_is_shown_as_it_is(tmp_path: Path) -> None:
    samples, _ = run({"mmmu": built(tmp_path, "mmmu")}, Grid([0], [0], ["real"]), Constant("no"))
    sample = replace(samples[0], turns=((samples[0].images_sha256[0], "what is <image>?"),), images_sha256=("x",))
    assert figures_of(sample) == [(samples[0].images_sha256[0], "what is <image>?", True)]


def test_ablations_move_or_take_every_image() -> None:
    query = Turn(IMAGES[0], "q ", " ", "a", more=((IMAGES[1], "and "), (IMAGES[2], "?")))
    demo = Turn(IMAGES[3], "q", " ", "b")
    episode = Episode("1", (demo, query), ("d", "e"), query, ("a",), "", "c")
    shuffled = ABLATIONS["shuffled"](episode, 0)
    every = [image for turn in (*shuffled.demos, shuffled.query) for image in turn.images]
    assert sorted(p.sha256 for p in every) == sorted(p.sha256 for p in [IMAGES[3], *IMAGES[:3], *IMAGES[:3]])
    assert [len(turn.images) for turn in (*shuffled.demos, shuffled.query)] == [1, 3, 3]
    bare = ABLATIONS["text_only"](episode, 0)
    assert bare.demos[1].segments == ((None, "q and ?"),)
    assert bare.query == query
    grey = ABLATIONS["blank"](episode, 0).query.images
    assert len(grey) == 3
    assert not set(grey) & set(IMAGES)


def test_a_demonstration_with_any_of_the_query_images_is_refused() -> None:
    query = Example("1", Turn(IMAGES[0], "q", " ", "a", more=((IMAGES[1], "?"),)), ("a",))
    other = png((30, 200, 30), 5)
    demo = Example("2", Turn(EncodedImage((other,)), "q", " ", "a", more=((IMAGES[1], "?"),)), ("a",))
    assert leak(demo, query) == "image"
    assert leak(Example("3", Turn(EncodedImage((other,)), "q", " ", "a"), ("a",)), query) == ""


def test_open_answers_are_numbers_to_two_decimals_or_words_within() -> None:
    for said, golds, right in (
        ("It is 1,250.499 dollars", ["1250.5"], True),
        ("12", ["2"], False),
        ("-3", ["3"], False),
        ("The Doppler effect.", ["doppler effect"], True),
        ("a doppler", ["doppler effect"], False),
        ("", ["5"], False),
        ("x", ["", "x"], True),
    ):
        assert open_match(said, golds) == float(right), said


def test_what_the_prompt_shares_ends_before_a_query_of_several_images(tmp_path: Path) -> None:
    task = built(tmp_path, "mmmu")
    assert isinstance(task, ExampleTask)
    for query in task.query_ids():
        prompt = PromptBuilder(Letters()).build(task.episode(query, 2, 0), 4)
        own = len(task.episode(query, 2, 0).query.images)
        assert prompt.shared[1] == len(prompt.images) - own
        assert prompt.ids[prompt.shared[0]] == Letters.image_token_id
