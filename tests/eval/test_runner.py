"""The loop: what it measures of models whose behaviour is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from eval.inference.engine import Engine
from eval.inference.feature_cache import FeatureCache
from eval.reports.results import rows_of
from eval.runner import Grid, run, run_cell
from eval.samples import Cell, Sample
from eval.spec import TaskSpec
from eval.task import Task
from eval.tasks.binding import BindingTask
from eval.tasks.examples import ExampleTask
from flamingo.errors import UserError
from tests.eval.worlds import NAMES, Constant, Looker, colour_examples


def tasks() -> dict[str, Task]:
    binding = TaskSpec(kind="binding", question="a", lead=" ", queries=40, output="rank", min_images=15)
    colours = TaskSpec(lead=" ", queries=24)
    return {
        "binding": BindingTask("binding", binding, colour_examples(60), NAMES),
        "colours": ExampleTask("colours", colours, colour_examples(60)),
        "ranked": ExampleTask("ranked", TaskSpec(lead=" ", queries=24, output="rank"), colour_examples(60)),
    }


def scores(samples: Sequence[Sample], every: Mapping[str, Task]) -> dict[tuple[str, int, str], float]:
    return {(row["task"], row["shots"], row["images"]): row["score"] for row in rows_of(samples, every)}


def test_a_model_that_looks_is_right_and_without_images_falls_to_chance() -> None:
    every = tasks()
    grid = Grid([0, 1, 4, 8], [0, 1, 2], ["real", "shuffled", "blank", "text_only"])
    samples, _ = run({"binding": every["binding"]}, grid, Looker())
    found = scores(samples, every)
    for shots in (1, 4, 8):
        assert found["binding", shots, "real"] == 1.0
        assert found["binding", shots, "blank"] == 0.5  # ties everywhere: the first candidate, right half the time
        assert found["binding", shots, "text_only"] == 0.5
    assert found["binding", 0, "real"] == found["binding", 0, "blank"] == 0.5
    assert 0.35 < found["binding", 4, "shuffled"] < 0.65
    assert ("binding", 0, "shuffled") not in found  # nothing to shuffle


def test_results_do_not_depend_on_batch_size_limit_or_the_other_settings() -> None:
    every = tasks()
    large, _ = run(every, Grid([0, 4], [0], ["real", "shuffled"], batch_size=64), Looker())
    small, _ = run(every, Grid([4], [0], ["shuffled", "real"], limit=5, batch_size=1), Looker())
    by_key = {(sample.cell, sample.query_id): sample for sample in large}
    assert len(small) == 2 * 3 * 5
    for sample in small:
        assert sample == by_key[sample.cell, sample.query_id]


def test_every_distinct_image_is_encoded_once() -> None:
    every, looker = tasks(), Looker()
    samples, cache = run(every, Grid([1, 4], [0, 1], ["real", "shuffled"], batch_size=7), looker)
    distinct = {image for sample in samples for image, _ in sample.turns if image is not None}
    assert looker.encode_calls == cache.encoded == len(distinct) == len(cache.images)
    assert cache.shown == sum(len(sample.turns) for sample in samples) > 5 * len(distinct)


def test_a_constant_model_scores_exactly_the_constant_baseline() -> None:
    every = tasks()
    every["colours"] = ExampleTask("colours", TaskSpec(lead=" ", queries=24), colour_examples(60, kinds=1))
    answer = every["colours"].baselines(every["colours"].query_ids()).constant_answer
    assert answer is not None
    assert answer.startswith("kind0: ")
    samples, _ = run(every, Grid([0, 2], [0], ["real"]), Constant(answer.removeprefix("kind0: ")))
    for row in rows_of(samples, every):
        if row["task"] != "ranked":  # its first candidate is not its most frequent answer
            assert row["score"] == row["constant"]
        if row["task"] == "binding":
            assert (row["chance"], row["constant"]) == (0.5, 0.5)
        if row["task"] == "ranked":
            assert row["chance"] == 0.5  # of its kind, every query has two answers


def test_copying_and_silence_are_reported() -> None:
    class Parrot(Looker):
        def _nearness(self, prompts, features):  # type: ignore[no-untyped-def]
            return [[(0.0, prompt.turns[-2][1])] for prompt in prompts]

    every = tasks()
    row = rows_of(run({"colours": every["colours"]}, Grid([2], [0], ["real"]), Parrot())[0], every)[0]
    assert (row["copy_last_rate"], row["copy_rate"], row["parse_fail_rate"]) == (1.0, 1.0, 0.0)
    row = rows_of(run({"colours": every["colours"]}, Grid([2], [0], ["real"]), Constant("\n "))[0], every)[0]
    assert (row["score"], row["parse_fail_rate"], row["copy_rate"]) == (0.0, 1.0, 0.0)


def test_dropped_demonstrations_are_counted_and_a_wrong_label_is_refused() -> None:
    every = {"colours": tasks()["colours"]}
    grid = Grid([4], [0], ["real"])
    longest = max(
        len(Looker().builder.build(every["colours"].episode(q, 4, 0), 32).ids) for q in grid.query_ids(every["colours"])
    )
    samples, _ = run(every, grid, Looker(context=longest + 32 - 1))
    row = rows_of(samples, every)[0]
    assert 0 < row["prompts_cut"] < row["n"]
    assert row["demos_shown"] == {"3": row["prompts_cut"], "4": row["n"] - row["prompts_cut"]}
    with pytest.raises(UserError, match=r"shots=4 does not fit .* at most 2 of 4"):
        run(every, grid, Looker(context=90))


def test_cell_keeps_the_order_of_the_queries_and_tells_its_progress() -> None:
    task, looker = tasks()["ranked"], Looker()
    done: list[int] = []
    queries = list(task.query_ids())[:10][::-1]
    cell = Cell("ranked", 2, 0, "real")
    samples = run_cell(task, cell, Engine(looker, FeatureCache(looker), 4), queries, on_batch=done.append)
    assert [sample.query_id for sample in samples] == queries
    assert done == [4, 4, 2]
    assert all(sample.answer in sample.candidates for sample in samples)
