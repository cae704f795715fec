"""Demonstrations are a function of (task, seed, query) and of nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from eval.demonstrations.samplers import draw
from eval.spec import SourceSpec, TaskSpec
from eval.task import generator, hash_order
from eval.tasks.binding import BindingTask
from eval.tasks.examples import ExampleTask
from flamingo.errors import UserError
from tests.eval.worlds import NAMES, colour_examples


def binding(queries: int = 16, per_class: int = 10) -> BindingTask:
    spec = TaskSpec(kind="binding", question="a", lead=" ", queries=queries, output="rank", min_images=per_class)
    return BindingTask("binding", spec, colour_examples(4 * per_class), NAMES)


def examples(queries: int = 10) -> ExampleTask:
    return ExampleTask("colours", TaskSpec(queries=queries, lead=" "), colour_examples(40))


def test_generator_depends_on_every_part_and_on_no_global_state() -> None:
    first = generator("demos", "hash", 0, "q").integers(1 << 40, size=4).tolist()
    generator("something else").integers(10)
    assert generator("demos", "hash", 0, "q").integers(1 << 40, size=4).tolist() == first
    others: list[tuple[str | int, ...]] = [
        ("demos", "hash", 1, "q"),
        ("demos", "hash", 0, "r"),
        ("demos", "hasi", 0, "q"),
        ("demos", "has", "h0", "q"),
    ]
    drawn = [tuple(generator(*parts).integers(1 << 40, size=4).tolist()) for parts in others]
    assert len({tuple(first), *drawn}) == 5


def test_hash_order_moves_no_others_when_an_item_is_added() -> None:
    ids = [f"id{i}" for i in range(30)]
    order = [ids[i] for i in hash_order(ids, "queries", "task")]
    more = [*ids, "new"]
    assert [name for name in (more[i] for i in hash_order(more, "queries", "task")) if name != "new"] == order
    assert order != ids


@pytest.mark.parametrize("sampler", ["random", "fixed", "same_kind"])
def test_demonstrations_are_nested_over_shots(sampler: str) -> None:
    support, query = colour_examples(30), colour_examples(1, seed=900)[0]
    query = replace(query, id="query")
    chosen = [draw(support, query, k, task_hash="h", seed=0, sampler=sampler).examples for k in range(9)]
    for k in range(8):
        assert chosen[k + 1][1:] == chosen[k]  # the far end is new, what stands next to the query stays
    if sampler == "same_kind":
        assert {example.kind for example in chosen[8]} == {query.kind}


def test_fixed_demonstrations_are_the_same_for_all_queries_and_random_ones_are_not() -> None:
    support = colour_examples(30)
    queries = [replace(example, id=f"q{i}") for i, example in enumerate(colour_examples(5, seed=900))]
    for sampler, expected in (("fixed", 1), ("random", 5)):
        drawn = {draw(support, query, 4, task_hash="h", seed=0, sampler=sampler).examples for query in queries}
        assert len(drawn) == expected


def test_the_query_and_identical_images_are_refused_and_counted() -> None:
    support = colour_examples(6)
    query = replace(support[2], id="the same image under another id")
    assert all(
        query.cluster != example.cluster
        for seed in range(20)
        for example in draw(support, query, 5, task_hash="h", seed=seed).examples
    )
    # With five shots of six examples one of which is refused, all of the others are shown.
    counts = [draw(support, query, 5, task_hash="h", seed=seed).excluded for seed in range(20)]
    assert set(counts) <= {0, 1}
    assert 1 in counts
    with pytest.raises(UserError, match="6 demonstrations"):
        draw(support, query, 6, task_hash="h", seed=0)


def test_a_limit_or_another_order_of_the_data_changes_no_demonstrations() -> None:
    task = examples()
    shuffled = colour_examples(40)[::-1]
    again = ExampleTask("colours", TaskSpec(queries=10, lead=" "), shuffled)
    assert again.query_ids() == task.query_ids()
    assert again.hash == task.hash
    for query_id in reversed(task.query_ids()):
        assert again.episode(query_id, 4, seed=3).demo_ids == task.episode(query_id, 4, seed=3).demo_ids
    assert task.episode(task.query_ids()[0], 4, 0).demo_ids != task.episode(task.query_ids()[0], 4, 1).demo_ids


def test_queries_are_not_in_the_support_set() -> None:
    task = examples()
    shown = {i for query in task.query_ids() for seed in range(5) for i in task.episode(query, 8, seed).demo_ids}
    assert shown
    assert not shown & set(task.query_ids())


def test_the_hash_tells_data_and_definition_but_not_paths() -> None:
    base = examples()
    moved = ExampleTask("colours", TaskSpec(queries=10, lead=" ", source=SourceSpec(path="/x")), colour_examples(40))
    other = ExampleTask("colours", TaskSpec(queries=10, lead=" "), colour_examples(40, seed=7))
    longer = ExampleTask("colours", TaskSpec(queries=10, lead=" ", max_new_tokens=5), colour_examples(40))
    assert moved.hash == base.hash
    assert len({base.hash, other.hash, longer.hash}) == 3


@pytest.mark.parametrize("shots", [0, 1, 4])
def test_binding_episodes_are_balanced_and_complete(shots: int) -> None:
    task = binding()
    episodes = [task.episode(query, shots, seed=0) for query in task.query_ids()]
    assert len(episodes) == 16
    for episode in episodes:
        shown = Counter(turn.answer for turn in episode.demos)
        assert set(shown) <= set(episode.candidates) <= set(NAMES)
        assert all(count == shots for count in shown.values())
        assert len({turn.image for turn in [*episode.demos, episode.query]}) == 2 * shots + 1
    # Neither "the first candidate" nor "the name shown last" is more often right than chance, nor both together.
    first = [episode.candidates[0] == episode.golds[0] for episode in episodes]
    assert sum(first) == 8
    if shots:
        last = [episode.demos[-1].answer == episode.golds[0] for episode in episodes]
        assert sum(last) == 8
        assert sum(a and b for a, b in zip(first, last, strict=True)) == 4


def test_binding_names_stand_for_one_class_each_and_demos_are_nested() -> None:
    task = binding()
    labels = {example.id: example.label for example in colour_examples(40)}
    for query in task.query_ids():
        longest = task.episode(query, 8, seed=1)
        for shots in (0, 1, 2, 4):
            shorter = task.episode(query, shots, seed=1)
            assert shorter.demo_ids == longest.demo_ids[len(longest.demo_ids) - 2 * shots :]
            assert (shorter.golds, shorter.candidates) == (longest.golds, longest.candidates)
        named = {(labels[i.split("=")[0]], i.split("=")[1]) for i in longest.demo_ids}
        assert len(named) == 2
        assert (labels[query], longest.golds[0]) in named


def test_binding_says_what_is_missing() -> None:
    task = binding()
    assert task.max_shots() == 9
    with pytest.raises(UserError, match="shots=10 needs 10"):
        task.episode(task.query_ids()[0], 10, 0)
    with pytest.raises(UserError, match="4 classes of at least 10 images and 1 names"):
        BindingTask("b", TaskSpec(min_images=10), colour_examples(40), ["kibo"])
    with pytest.raises(UserError, match="first and last two letters"):
        BindingTask("b", TaskSpec(), colour_examples(40), ["kibo", "kilu"]).episode("doc000", 1, 0)


def test_hashes_and_draws_are_those_of_the_published_figures() -> None:
    """Demonstrations are drawn by the task's hash: a renamed setting or stream must not change either."""
    task = ExampleTask("colours", TaskSpec(queries=6, lead=" "), colour_examples(24))
    assert task.hash.startswith("2ad58151671491e1")
    assert task.episode(task.query_ids()[0], 3, 0).demo_ids == ("doc017", "doc005", "doc011")
    faulty = TaskSpec(queries=6, lead=" ", zero_shot="two_text_first_image", num_beams=3, metrics=["vqa"])
    assert ExampleTask("colours", faulty, colour_examples(24)).hash.startswith("6f480fb59ba2d088")
    spec = TaskSpec(kind="binding", question="a", lead=" ", queries=40, output="rank", min_images=15)
    binding = BindingTask("binding", spec, colour_examples(60), NAMES)
    demos = binding.episode(binding.query_ids()[0], 2, 1).demo_ids
    assert demos == ("doc003=lumo", "doc000=gusi", "doc044=gusi", "doc027=lumo")
