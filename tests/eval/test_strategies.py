"""Strategies, on models that answer by a rule the test knows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.inference.engine import Engine
from eval.inference.feature_cache import FeatureCache
from eval.inference.protocol import Responder
from eval.metrics.captions import rouge_l
from eval.prompting.prompts import Completion, Decoding, EncodedPrompt, PromptBuilder
from eval.prompting.strategies import (
    STRATEGIES,
    PromptingSettings,
    Query,
    answer_turn,
    different_orders,
    rationale_turn,
    read_rationales,
    softmax,
)
from eval.reports.results import sample_line, summary, table
from eval.runner import Grid, run, run_cell
from eval.samples import Cell, Sample
from eval.spec import TaskSpec
from eval.task import EncodedImage, Example, Turn
from eval.tasks.examples import ExampleTask
from flamingo.errors import UserError
from tests.eval.worlds import COLOURS, Constant, Letters, Looker, colour_examples


def with_rationales(examples: Sequence[Example]) -> list[Example]:
    return [replace(d, turn=replace(d.turn, rationale=f"It is {d.golds[0]} all over ({d.id}).")) for d in examples]


def task(output: str = "generate", rationales: bool = True, **spec: object) -> ExampleTask:
    examples = colour_examples(60)
    options = TaskSpec(lead=" ", queries=12, output=output, **spec)  # type: ignore[arg-type]
    return ExampleTask("colours", options, with_rationales(examples) if rationales else examples)


class Script(Responder):
    """Says what `says` makes of a prompt and a draw; ranks the candidate highest that its text names last."""

    def __init__(self, says: Callable[[str, int], str]) -> None:
        self.builder = PromptBuilder(Letters())
        self.prompts: list[str] = []
        self._says = says

    def encode(self, images: Sequence[EncodedImage]) -> Tensor:
        return torch.zeros(len(images), 1, 1)

    def _text(self, prompt: EncodedPrompt) -> str:
        text = "".join(chr(i) if i < 1000 else "#" for i in prompt.ids)
        self.prompts.append(text)
        return text

    def rank(self, prompts: Sequence[EncodedPrompt], features: Tensor) -> list[list[float]]:
        found = []
        for prompt in prompts:
            text = self._text(prompt)
            words = ["".join(map(chr, ids[:-1])) for ids in prompt.candidates]
            query = text[text.rfind("#") :]
            found.append([float(query.rfind(word)) for word in words])
        return found

    def generate(self, prompts: Sequence[EncodedPrompt], features: Tensor, max_new_tokens: int) -> list[Completion]:
        return self.sample(prompts, features, Decoding(max_new_tokens), [""] * len(prompts))

    def sample(
        self, prompts: Sequence[EncodedPrompt], features: Tensor, decoding: Decoding, streams: Sequence[str]
    ) -> list[Completion]:
        assert len(set(streams)) == len(streams) or decoding.temperature == 0
        return [Completion(self._says(self._text(p), n), True, -1.0) for n, p in enumerate(prompts)]


def samples_of(
    strategy: str, model: Script | Looker | Constant, of: ExampleTask, shots: int = 2, **own: object
) -> list[Sample]:
    cell = Cell("colours", shots, 0, "real", strategy)
    settings = PromptingSettings(**{"samples": 5, **own})  # type: ignore[arg-type]
    return run_cell(of, cell, Engine(model, FeatureCache(model), 7), of.query_ids(), settings)


@pytest.mark.parametrize("output", ["generate", "rank"])
def test_chains_of_thought_put_the_rationale_before_the_answer(output: str) -> None:
    def says(text: str, number: int) -> str:
        return "blue" if text.endswith("the answer is") else "I see a blue square. Therefore, the answer is not this"

    of = task(output, candidates=list(COLOURS) if output == "rank" else [])
    for strategy, start in (("cot0", "Let's think step by step. I see"), ("cot", "I see")):
        model = Script(says)
        for sample in samples_of(strategy, model, of):
            assert sample.rationale == "I see a blue square."
            query = sample.turns[-1][1]
            assert query.endswith(f"what colour? {start} a blue square. Therefore, the answer is")
            assert sample.score == float("blue" in sample.golds)
            shown = sample.turns[0][1]
            assert ("Therefore" in shown) == (strategy == "cot")
            if strategy == "cot":
                number = sample.demo_ids[0]
                assert f"all over ({number}). Therefore, the answer is {shown.split()[-1]}" in shown
        assert len(model.prompts) == 24


def test_two_stages_are_joined_by_the_query_whatever_the_order() -> None:
    def says(text: str, number: int) -> str:
        # Each rationale holds the query's own place in the batch of its first stage; the answer repeats it.
        query = text[text.rfind("#") :]
        return (
            query.split("Solution: ")[1].split("\n")[0]
            if "Answer:" in query
            else f"reason {len(text)} {hash(text) % 97}"
        )

    of = task()
    forward, backward = Script(says), Script(says)
    one = samples_of("two_stage", forward, of)
    cell = Cell("colours", 2, 0, "real", "two_stage")
    two = run_cell(of, cell, Engine(backward, FeatureCache(backward), 5), list(of.query_ids())[::-1])
    assert one == two[::-1]
    assert len({sample.rationale for sample in one}) > 6
    for sample in one:
        assert sample.answer == sample.rationale
        assert sample.turns[0][1].count("Solution: It is") == 1
        assert sample.turns[-1][1].endswith(f"Solution: {sample.rationale}\nAnswer:")


def test_two_stages_need_no_demonstrations_and_no_leftover_of_the_tasks_own_prompt() -> None:
    """The paper's setting. The rationale comes where the task's own question says "Answer:", so that goes."""
    model = Script(lambda text, number: "blue" if text.endswith("Answer:") else "It is blue all over.")
    for cue in ("", " Answer:", "\nAnswer: ", " Short answer:", "\nANSWER:"):
        of = task(question="Question: {question}" + cue)
        asked = of.episode(of.query_ids()[0], 0, 0).query
        shown = replace(asked, question=f"Question: what colour?{cue}")
        model.prompts.clear()
        sample = samples_of("two_stage", model, _asking(of, shown), shots=0)[0]
        assert model.prompts[0] == "#Question: what colour?\nSolution:"
        assert sample.turns[-1][1] == "Question: what colour?\nSolution: It is blue all over.\nAnswer:"
        assert (sample.answer, sample.rationale) == ("blue", "It is blue all over.")
    kept = replace(asked, question="Is this an Answer: yes?")  # only at the end
    assert rationale_turn(kept).question == "Is this an Answer: yes?"
    several = replace(asked, more=((EncodedImage((b"x",)), " and this? Answer:"),))
    assert answer_turn(several, "why").more[-1][1] == " and this?\nSolution: why\nAnswer:"


def _asking(of: ExampleTask, turn: Turn) -> ExampleTask:
    """The same task with another question in every episode."""
    plain = of.episode
    of.episode = lambda *given: replace(plain(*given), query=turn)  # type: ignore[method-assign]
    return of


def test_rationales_are_compared_with_those_of_the_data() -> None:
    of = task()
    right = samples_of("two_stage", Script(lambda text, number: "It is red all over (doc000)."), of, shots=0)
    golds = {of.episode(query_id, 0, 0).query.rationale for query_id in of.query_ids()}
    assert {sample.gold_rationale for sample in right} == golds
    row = summary(right, of.baselines([sample.query_id for sample in right]))
    measured = row["metrics"]["rationale_rouge_l"]
    assert measured["n"] == len(right)
    each = [rouge_l("It is red all over (doc000).", [sample.gold_rationale]) for sample in right]
    assert measured["score"] == pytest.approx(sum(each) / len(each))
    assert 0.5 < measured["score"] < 1
    silent = samples_of("two_stage", Script(lambda text, number: ""), of, shots=0)
    assert summary(silent, of.baselines(of.query_ids()))["metrics"]["rationale_rouge_l"]["score"] == 0.0
    plain = samples_of("plain", Script(lambda text, number: "red"), of, shots=0)
    assert {sample.gold_rationale for sample in plain} == {""}
    assert "rationale_rouge_l" not in summary(plain, of.baselines(of.query_ids()))["metrics"]


def test_what_is_left_out_is_said() -> None:
    of = {"colours": task()}
    grid = Grid([0, 2], [0], ["real", "shuffled"], strategies=["two_stage", "cot", "orders"])
    assert [(c.strategy, c.images, c.shots) for c in grid.cells(of)][:3] == [
        ("two_stage", "real", 0),
        ("two_stage", "real", 2),
        ("two_stage", "shuffled", 2),
    ]
    said = [f"{name} is left out at 0 shots" for name in ("strategy=cot", "strategy=orders", "images=shuffled")]
    assert [sentence.split(",")[0] for sentence in grid.left_out()] == said
    results = {"rows": [], **grid.description()}
    assert all(sentence in table(results) for sentence in said)
    assert Grid([2], [0], ["shuffled"], strategies=["cot"]).left_out() == []
    assert "left_out" not in Grid([0], [0], ["real"]).description()
    with pytest.raises(UserError, match="nothing is left to ask: strategy=cot is left out at 0 shots"):
        Grid([0], [0], ["real"], strategies=["cot"]).cells(of)


def test_the_second_stage_takes_the_rationales_of_another_run(tmp_path: Path) -> None:
    of, path = task(), tmp_path / "samples.jsonl"
    first = samples_of("two_stage", Script(lambda text, number: f"because {len(text)}"), of)
    path.write_text("".join(json.dumps(sample_line(sample)) + "\n" for sample in first[::-1]))
    model = Script(lambda text, number: "blue")
    second = samples_of("two_stage", model, of, rationales=str(path))
    assert [sample.rationale for sample in second] == [sample.rationale for sample in first]
    assert len(model.prompts) == len(second)  # one stage alone was asked
    path.write_text("".join(json.dumps(sample_line(sample)) + "\n" for sample in first[1:]))
    read_rationales.cache_clear()
    with pytest.raises(UserError, match=f"has none for query {first[0].query_id}, seed 0"):
        samples_of("two_stage", model, of, rationales=str(path))
    with pytest.raises(UserError, match=r"is not the samples.jsonl of a run"):
        samples_of("two_stage", model, of, rationales="/nowhere")


def test_self_consistency_votes_and_counts_what_it_cannot_parse() -> None:
    said = iter(["red", "blue", "", "blue", "red"] * 12)
    for sample in samples_of("sc", Script(lambda text, number: next(said)), task()):
        assert sorted(dict(sample.votes).items()) == [("blue", 0.4), ("red", 0.4)]
        assert (sample.answer, sample.confidence, sample.parse_failed) == ("blue", 0.4, False)
    for sample in samples_of("sc", Script(lambda text, number: " \n"), task()):
        assert (sample.answer, sample.confidence, sample.parse_failed, sample.score) == ("", 0.0, True, 0.0)


def test_self_consistency_over_chains_ranks_behind_each_rationale() -> None:
    colours = iter(["red", "blue", "red", "red", "green"] * 12)
    model = Script(lambda text, number: f"I see {next(colours)}.")
    found = samples_of("sc_cot", model, task("rank", candidates=["red", "green", "blue", "grey"]))
    for sample in found:
        assert sample.votes[0] == ("red", 0.6)
        assert sample.confidence == 0.6
        assert sample.rationale == "I see red."


def test_orders_are_different_and_their_scores_are_averaged() -> None:
    of = task("rank")
    episode = of.episode(of.query_ids()[0], 3, 0)
    query = Query(of, episode, PromptBuilder(Letters()), PromptingSettings(orders=4), 0)
    found = different_orders(query)
    assert found[0] == [0, 1, 2]
    assert len({tuple(order) for order in found}) == 4
    assert len(different_orders(replace(query, settings=PromptingSettings(orders=50)))) == 6
    assert different_orders(query) == found

    class Last(Looker):  # believes the demonstration next to the query
        def _nearness(self, prompts, features):  # type: ignore[no-untyped-def]
            return [[(float(n), text) for n, (_, text) in enumerate(p.turns[:-1])] for p in prompts]

    sample = samples_of("orders", Last(), of, shots=2, orders=2)[0]
    shown = sample.turns[0][1].split()[-1], sample.turns[1][1].split()[-1]
    if shown[0] != shown[1]:
        assert dict(zip(sample.candidates, sample.log_probs, strict=True))[shown[0]] == 0.5


def test_calibration_takes_the_prior_away() -> None:
    class Biased(Looker):
        def rank(self, prompts: Sequence[EncodedPrompt], features: Tensor) -> list[list[float]]:
            found = super().rank(prompts, features)
            return [[score / 100 + 1e8 * (place == 0) for place, score in enumerate(row)] for row in found]

    of = task("rank", rationales=False)
    plain, calibrated = (samples_of(strategy, Biased(), of, shots=4) for strategy in ("plain", "calibrated"))
    assert {sample.answer == sample.candidates[0] for sample in plain} == {True}
    assert {sample.answer == sample.candidates[0] for sample in calibrated} == {True, False}
    assert sum(s.score for s in calibrated) > sum(s.score for s in plain)
    free = of.content_free(of.episode(of.query_ids()[0], 0, 0).query)
    assert free.question == "N/A"


def test_strategies_that_do_not_fit_say_so() -> None:
    with pytest.raises(UserError, match=r"has no rationale; .* source.fields.rationale"):
        samples_of("cot", Looker(), task(rationales=False))
    with pytest.raises(UserError, match="sc samples answers, but this task ranks"):
        samples_of("sc", Looker(), task("rank"))
    with pytest.raises(UserError, match="calibrated compares candidates"):
        samples_of("calibrated", Looker(), task())
    with pytest.raises(UserError, match="Looker only decodes greedily"):
        samples_of("sc", Looker(), task())


def test_the_grid_runs_strategies_beside_each_other_and_leaves_out_what_makes_no_sense() -> None:
    of = task("rank")
    grid = Grid([0, 2], [0], ["real", "shuffled"], strategies=["plain", "orders", "cot"])
    cells = [(c.strategy, c.images, c.shots) for c in grid.cells({"colours": of})]
    assert cells == [
        ("plain", "real", 0),
        ("plain", "real", 2),
        ("plain", "shuffled", 2),
        ("orders", "real", 2),
        ("orders", "shuffled", 2),
        ("cot", "real", 2),
        ("cot", "shuffled", 2),
    ]
    samples, _ = run({"colours": of}, Grid([2], [0], ["real"], strategies=list(STRATEGIES)[:1]), Looker())
    assert all(sample.confidence is not None and 0 <= sample.confidence <= 1 for sample in samples)


def test_softmax_of_what_is_impossible_is_even() -> None:
    assert softmax([-float("inf")] * 4) == [0.25] * 4
    assert softmax([0.0, -1e9]) == [1.0, 0.0]
