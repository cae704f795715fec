"""Retrieved, balanced and listed demonstrations; what the leakage guard refuses."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.demonstrations.retrieval import Retriever
from eval.demonstrations.samplers import SAMPLERS, draw, leak, near_duplicates, parse_sampler
from eval.inference.engine import Engine
from eval.inference.feature_cache import FeatureCache
from eval.reports.results import rows_of
from eval.runner import Grid, run
from eval.spec import TaskSpec
from eval.task import EncodedImage, Example, Turn
from eval.tasks.examples import ExampleTask
from flamingo.errors import UserError
from tests.eval.worlds import COLOURS, Looker, colour_examples
from tests.fixtures import png

TOPICS = ["what colour is the dog", "what colour is the cat", "how many boats are there", "how many cups are there"]


def examples(count: int = 60) -> list[Example]:
    found = colour_examples(count)
    asked = [replace(d.turn, question=f"{TOPICS[i // 4 % 4]} {i}?") for i, d in enumerate(found)]
    return [replace(d, turn=turn) for d, turn in zip(found, asked, strict=True)]


def embed(images: Sequence[EncodedImage]) -> np.ndarray:
    return FeatureCache(Looker()).embeddings(images).numpy()


def connected(demos: str, **spec: object) -> ExampleTask:
    task = ExampleTask("colours", TaskSpec(lead=" ", queries=12, demos=demos, **spec), examples())  # type: ignore[arg-type]
    task.connect(Engine(Looker(), FeatureCache(Looker()), 8), task.query_ids())
    return task


MODES = ["random", "fixed", "same_kind", "balanced", "rices_image", "rices_text", "rices_joint", "rices_joint:0.2"]


@pytest.mark.parametrize("demos", [*MODES, "mmr", "mmr:0.9"])
def test_every_sampler_is_nested_and_a_function_of_the_query(demos: str) -> None:
    task, again = connected(demos), connected(demos)
    for query_id in reversed(again.query_ids()):
        again.episode(query_id, 7, 0)
    for query_id in task.query_ids():
        longest = task.episode(query_id, 8, 0).demo_ids
        assert len(set(longest)) == 8
        for shots in (1, 4):
            assert task.episode(query_id, shots, 0).demo_ids == longest[-shots:]
        assert again.episode(query_id, 8, 0).demo_ids == longest


def test_retrieval_by_image_finds_the_colour_and_the_nearest_stands_last() -> None:
    task = connected("rices_image")
    support = {d.id: d for d in examples()}
    for query_id in task.query_ids():
        query = support[query_id]
        shown = [support[name] for name in task.episode(query_id, 4, 0).demo_ids]
        assert {d.label for d in shown} == {query.label}
        vectors = embed([d.turn.image for d in [*shown, query] if d.turn.image is not None])
        similarity = vectors[:-1] @ vectors[-1]
        assert (np.diff(similarity) >= -1e-4).all()


def test_retrieval_by_text_finds_the_topic_and_jointly_finds_both() -> None:
    support = {d.id: d for d in examples()}

    def shares(demos: str) -> tuple[float, float]:
        task = connected(demos)
        pairs = [(support[q], support[n]) for q in task.query_ids() for n in task.episode(q, 2, 0).demo_ids]
        topic = [a.turn.question.split()[-2] == b.turn.question.split()[-2] for a, b in pairs]
        return float(np.mean([a.label == b.label for a, b in pairs])), float(np.mean(topic))

    assert shares("rices_text")[1] == 1.0
    assert shares("rices_text")[0] < 0.6
    assert min(shares("rices_joint")) > 0.8


def test_diversity_is_what_is_traded() -> None:
    support, query = examples(), replace(colour_examples(1, seed=900)[0], id="query")

    def labels(trade: float) -> int:
        retriever = Retriever(support, [query], 1.0, embed)
        found = draw(support, query, 4, task_hash="h", seed=0, sampler=f"mmr:{trade}", retriever=retriever)
        return len({example.label for example in found.examples})

    assert labels(1.0) == 1
    assert labels(0.2) == 4


def test_balanced_demonstrations_show_every_class_equally_often() -> None:
    uneven = [d for i, d in enumerate(examples()) if d.label == "red" or i % 3 == 0]
    query = replace(colour_examples(1, seed=900)[0], id="query")
    for seed in range(5):
        shown = draw(uneven, query, 8, task_hash="h", seed=seed, sampler="balanced").examples
        assert set(Counter(d.label for d in shown).values()) == {2}
        assert len({d.label for d in shown[-4:]}) == 4  # in every round


def test_a_file_says_what_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "demos.json"
    base = ExampleTask("colours", TaskSpec(lead=" ", queries=12), examples())
    support = sorted({d.id for d in examples()} - set(base.query_ids()))
    first = base.query_ids()[0]
    path.write_text(json.dumps({first: support[:3], "*": support[3:6]}))
    task = connected(f"file:{path}")
    assert task.episode(first, 2, 0).demo_ids == tuple(support[1:3])
    assert task.episode(task.query_ids()[1], 3, 7).demo_ids == tuple(support[3:6])
    with pytest.raises(UserError, match=r"4 demonstrations \(demos=file"):
        task.episode(first, 4, 0)
    moved = tmp_path / "moved.json"
    moved.write_text(path.read_text())
    assert connected(f"file:{moved}").hash == task.hash
    moved.write_text(json.dumps({"*": support[:3]}))
    assert connected(f"file:{moved}").hash != task.hash
    moved.write_text(json.dumps({"*": ["nobody"]}))
    with pytest.raises(UserError, match=r"'nobody' .* is not in the support set"):
        connected(f"file:{moved}")
    with pytest.raises(UserError, match="cannot be read"):
        connected("file:/nowhere.json")


@pytest.mark.parametrize("text", ["nearest", "random:2", "mmr:2", "rices_joint:x", "file"])
def test_wrong_samplers_are_named(text: str) -> None:
    with pytest.raises(UserError, match=text.split(":")[0]):
        parse_sampler(text)
    assert parse_sampler("rices_joint").value == 0.5
    assert all(SAMPLERS.values())


def test_retrieval_that_cannot_be_says_why() -> None:
    same = ExampleTask("colours", TaskSpec(queries=4, demos="rices_text"), colour_examples(20))
    engine = Engine(Looker(), FeatureCache(Looker()), 8)
    with pytest.raises(UserError, match=r"task colours: demos=rices_text: .* different questions"):
        same.connect(engine, same.query_ids())
    bare = [replace(d, turn=replace(d.turn, image=None)) for d in examples()]
    task = ExampleTask("colours", TaskSpec(queries=4, demos="rices_image"), bare)
    with pytest.raises(UserError, match=r"no image to compare; use demos=rices_text"):
        task.connect(engine, task.query_ids())


def scene(size: int, quality: int | None = None, shift: int = 0, seed: int = 0) -> EncodedImage:
    """An image with some structure, re-encoded as told."""
    y, x = np.mgrid[0:size, 0:size] / size * 6
    waves = [np.sin(x * (1 + c) + seed) * np.cos(y * (2 - c / 2) + shift) for c in range(3)]
    image = Image.fromarray((np.stack(waves, -1) * 110 + 128).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG" if quality is None else "JPEG", **({} if quality is None else {"quality": quality}))
    return EncodedImage((buffer.getvalue(),))


def test_near_duplicates_are_told_from_similar_ones() -> None:
    original = scene(128)
    assert near_duplicates(original, scene(128, quality=70))
    assert near_duplicates(original, scene(96, quality=85))
    assert not near_duplicates(original, scene(128, shift=1))
    assert not near_duplicates(original, scene(128, seed=2))
    flat = [EncodedImage((png(colour, 1),)) for colour in COLOURS.values()]
    assert not any(near_duplicates(a, b) for a in flat for b in flat if a is not b)
    assert not near_duplicates(EncodedImage((b"no image",)), original)


def item(name: str, image: EncodedImage | None, question: str = "what?") -> Example:
    return Example(name, Turn(image, question, " ", "yes"), ("yes",))


def test_the_guard_refuses_each_leak_by_its_reason_and_counts_it() -> None:
    query = item("q", scene(128), "Is it red?")
    assert leak(item("q", scene(64, seed=3)), query) == "item"
    assert leak(item("renamed", scene(128)), query) == "image"
    assert leak(item("rescaled", scene(96, quality=90)), query) == "near_duplicate"
    assert leak(item("same question of another image", scene(128, seed=2), "Is it red?"), query) == ""
    bare = item("t", None, "Is it red?")
    assert leak(item("u", None, "is it  RED"), bare) == "question"
    assert leak(item("u", None, "is it blue"), bare) == ""
    assert leak(item("u", scene(64), "Is it red?"), bare) == ""
    support = [
        item("a", scene(128)),
        item("b", scene(96, quality=90)),
        *(item(f"c{i}", scene(64, seed=i + 2)) for i in range(3)),
    ]
    found = draw(support, query, 3, task_hash="h", seed=0, sampler="fixed")
    assert {example.id for example in found.examples} == {"c0", "c1", "c2"}
    counts = [dict(draw(support, query, 3, task_hash="h", seed=seed).refused) for seed in range(30)]
    assert {"image": 1, "near_duplicate": 1} in counts
    with pytest.raises(UserError, match="only 3 of the support set's 5 may be shown"):
        draw(support, query, 4, task_hash="h", seed=0)


def test_refusals_are_in_the_results_by_reason() -> None:
    pool = [*colour_examples(30), *(replace(d, id=f"copy of {d.id}") for d in colour_examples(30))]
    task = ExampleTask("colours", TaskSpec(lead=" ", queries=20, demos="rices_image"), pool)
    samples, _ = run({"colours": task}, Grid([4], [0], ["real"]), Looker())
    row = rows_of(samples, {"colours": task})[0]
    twins = sum(
        ("copy of" in q and q[8:] not in task.query_ids()) or f"copy of {q}" not in task.query_ids()
        for q in task.query_ids()
    )
    assert row["leaks_by_reason"]["image"] == row["leaks_refused"] > 0
    assert row["leaks_refused"] <= twins
    assert task.description["retrieval"] == {"images": 1.0, "encoder": "Looker"}


def test_a_support_set_that_holds_queries_is_refused() -> None:
    pool = examples()
    with pytest.raises(UserError, match=r"task colours: 12 of its 12 queries are also in the support set \(first"):
        ExampleTask("colours", TaskSpec(queries=12), pool, pool)
    assert ExampleTask("colours", TaskSpec(queries=60), pool, colour_examples(20, seed=5000)).max_shots() == 20
