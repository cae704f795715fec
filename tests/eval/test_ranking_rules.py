"""How candidates are compared, where they come from, and what answers are stemmed by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from eval.compose import load_config
from eval.inference.model import FlamingoResponder
from eval.metrics.stems import Stems
from eval.metrics.wordnet import WordNet
from eval.prompting.prompts import EncodedPrompt, PromptBuilder
from eval.runner import Grid, run
from eval.samples import Sample
from eval.spec import TaskSpec
from eval.task import Example, Task, Turn
from eval.tasks.build import build_task
from eval.tasks.examples import ExampleTask
from flamingo.errors import UserError
from tests.eval.published import dump
from tests.eval.test_metrics_table import small_wordnet
from tests.eval.test_protocols import built, text
from tests.eval.worlds import COLOURS, EOC, Constant, Letters, colour_examples
from tests.model import tiny


class ByLength(Constant):
    """-1 for a candidate's first token, -0.1 for each further one: sums and means put them in opposite orders."""

    def rank(self, prompts: Sequence[EncodedPrompt], features: Tensor) -> list[list[float]]:
        return [[-1 - 0.1 * (len(ids) - 1) for ids in prompt.candidates] for prompt in prompts]


def ranked(**settings: object) -> list[Sample]:
    spec = TaskSpec(queries=6, lead=" ", output="rank", candidates=["blue", "grey", "greenish"])
    task: Task = ExampleTask("colours", replace(spec, **settings), colour_examples(24))  # type: ignore[arg-type]
    samples, _ = run({"colours": task}, Grid([2], [0], ["real"]), ByLength("x"))
    return samples


def test_the_sum_favours_short_answers_and_the_mean_long_ones() -> None:
    sums, means = ranked(), ranked(ranking="mean")
    assert {sample.answer for sample in sums} == {"blue"}
    assert {sample.answer for sample in means} == {"greenish"}
    tokens = [len(" blue"), len(" grey"), len(" greenish")]  # a letter is a token
    shared = len(" ")  # is in the prompt where sums are compared: it is the same for all
    assert sums[0].log_probs == pytest.approx([-1 - 0.1 * (n - shared) for n in tokens])
    assert means[0].log_probs == pytest.approx([(-1 - 0.1 * n) / (n + 1) for n in tokens], abs=1e-4)
    without = ranked(ranking="mean", rank_end=False)
    assert without[0].log_probs == pytest.approx([(-1 - 0.1 * (n - 1)) / n for n in tokens], abs=1e-4)


def test_means_of_a_real_model_are_its_token_log_probabilities() -> None:
    responder = FlamingoResponder(*tiny.flamingo("llama"))
    task = ExampleTask("c", TaskSpec(queries=3, lead=" ", output="rank", ranking="mean"), colour_examples(24))
    samples, _ = run({"c": task}, Grid([1], [0], ["real"]), responder)
    for sample in samples:
        episode = task.episode(sample.query_id, 1, 0)
        prompt = responder.builder.build(episode, 4, whole_candidates=True)
        sums = responder.rank([prompt], responder.encode(prompt.images))[0]
        lengths = [len(ids) for ids in prompt.candidates]
        assert lengths == [len(f" {name}") + 1 for name in episode.candidates]
        assert sample.log_probs == pytest.approx([s / n for s, n in zip(sums, lengths, strict=True)], abs=2e-4)


def test_protocols_rank_as_their_papers_do(tmp_path: Path) -> None:
    def ending(*settings: str) -> tuple[str, int]:
        task = built(tmp_path, "imagenet", *settings)
        episode = task.episode(task.query_ids()[0], 1, 0)
        prompt = PromptBuilder(Letters()).build(episode, 4, end_candidates=task.rank_end)
        return task.ranking, prompt.candidates[0][-1]

    assert ending("protocol=flamingo") == ("sum", EOC)
    assert ending("protocol=openflamingo") == ("mean", EOC)
    assert ending("protocol=openflamingo", "bug_compatible=true")[1] != EOC


def test_two_fixed_texts_are_the_same_for_all_queries_and_only_at_zero_shots(tmp_path: Path) -> None:
    drawn = built(tmp_path, "vqav2", "protocol=openflamingo")
    fixed = built(tmp_path, "vqav2", "protocol=openflamingo", "task.vqav2.zero_shot=two_text_fixed")
    assert drawn.hash != fixed.hash
    shown = {
        name: {task.episode(q, 0, 0).demo_ids for q in task.query_ids()}
        for name, task in (("drawn", drawn), ("fixed", fixed))
    }
    assert len(shown["fixed"]) == 1 < len(shown["drawn"])
    (two,) = shown["fixed"]
    assert len(two) == 2
    assert text(fixed.episode(fixed.query_ids()[0], 0, 0)).count("#") == 1
    assert {fixed.episode(q, 0, 1).demo_ids for q in fixed.query_ids()} != shown["fixed"]
    assert len({fixed.episode(q, 2, 0).demo_ids for q in fixed.query_ids()}) > 1


def vocabulary(tmp_path: Path, where: str) -> ExampleTask:
    return built(tmp_path, "ivqa", "task.ivqa.output=rank", f"task.ivqa.candidates_from={where}")


def test_candidates_come_from_a_file_or_from_what_the_support_says_often(tmp_path: Path) -> None:
    often = vocabulary(tmp_path, "support:12")  # six questions, each with spoon twice and three answers once
    assert often.episode(often.query_ids()[0], 0, 0).candidates == ("spoon",)
    every = vocabulary(tmp_path, "support:1")
    assert every.episode(every.query_ids()[0], 0, 0).candidates == ("cup", "fork", "pan", "spoon")
    assert often.hash != every.hash
    dump(tmp_path / "ivqa" / "vocab.json", {"whisk": 0, "spoon": 1})
    listed = vocabulary(tmp_path, "vocab.json")
    assert listed.episode(listed.query_ids()[0], 0, 0).candidates == ("spoon", "whisk")
    for where, message in (
        ("support:x", "give a count of 1 or more, as in support:2"),
        ("support:99", "no answer in the support set is that frequent; lower it"),
        ("gone.json", "gone.json does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            vocabulary(tmp_path, where)
    (tmp_path / "ivqa" / "vocab.json").write_text("3")
    with pytest.raises(UserError, match="neither a list of answers nor an object"):
        vocabulary(tmp_path, "vocab.json")


PAIRS = [("riding horses", "ride horse"), ("riding", "ride"), ("horses", "horse"), ("Dogs", "dog"), ("ring", "ring")]


def test_stems_are_those_of_the_annotations_then_wordnet(tmp_path: Path) -> None:
    stems = Stems([*PAIRS, ("morning", "morn"), ("morning", "morn"), ("morning", "morning")])
    said = {"Riding horses": "ride horse", "horses riding": "horse ride", "dogs": "dog", "morning": "morn"}
    said |= {"cats": "cats", "": "", "ring": "ring"}
    assert {answer: stems(answer) for answer in said} == said
    net = Stems(PAIRS, WordNet(small_wordnet(tmp_path / "wn")))
    assert [net(word) for word in ("cats", "seeing", "cat", "xs")] == ["cat", "see", "cat", "xs"]
    assert stems.hash != net.hash
    assert "no WordNet here" in stems.description


def test_okvqa_is_stemmed_where_the_protocol_is_openflamingo(tmp_path: Path) -> None:
    plain = built(tmp_path, "okvqa")
    stemmed = built(tmp_path, "okvqa", "protocol=openflamingo")
    query = stemmed.query_ids()[0]
    assert set(plain.episode(query, 0, 0).golds) == {"reds", "others"}
    assert set(stemmed.episode(query, 0, 0).golds) == {"red", "other"}
    episode = stemmed.episode(query, 1, 0)
    assert episode.demos[0].answer == "other"  # demonstrations show stemmed answers, the first annotator's
    assert stemmed.parse("reds", episode) == "red"
    assert plain.parse("reds", episode) == "reds"
    assert stemmed.score(stemmed.parse("reds", episode), episode) == 1.0
    assert json.dumps(stemmed.description["stems"]).startswith('"2 answers, 2 words')
    bare = load_config(["model=m", "task=toy_vqa", "task.toy_vqa.stem=okvqa", f"task.toy_vqa.source.path={tmp_path}"])
    with pytest.raises(UserError, match="toy_vqa"):
        build_task("toy_vqa", bare.task["toy_vqa"])


def test_a_example_may_ask_about_no_image_and_still_be_ranked() -> None:
    examples = [Example(str(n), Turn(None, f"q{n}", " ", name), (name,)) for n, name in enumerate([*COLOURS] * 4)]
    task = ExampleTask("words", TaskSpec(queries=4, lead=" ", output="rank", ranking="mean"), examples)
    samples, cache = run({"words": task}, Grid([0, 2], [0], ["real"]), ByLength("x"))
    assert cache.encoded == 0
    assert len(samples) == 8
