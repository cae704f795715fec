"""Binding over a labelled collection: classes under their own names, and queries of one source alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.shards.writer import Document, Image, ShardWriter, Text
from eval.compose import load_config
from eval.spec import SourceSpec, TaskSpec
from eval.task import Example
from eval.tasks.binding import BindingTask
from eval.tasks.build import build_task
from flamingo.errors import UserError
from tests.fixtures import png

NAMES = ["onion", "trolley bus", "onion ring", "cat", "crane", "crane fly"]
MADE_UP = [a + b for a in ("ba", "ke", "mo", "ti") for b in ("du", "fi", "lo", "na")]
SOURCES = ("noto", "open", "fluent", "two")


def write_things(folder: Path) -> Path:
    with ShardWriter(folder, "things") as writer:
        for number, name in enumerate(NAMES):
            for index, source in enumerate(SOURCES):
                image = png((40 * number, 60 * index, 9))
                meta = {"class": name, "names": MADE_UP[number : number + 2], "kind": source}
                writer.write(Document("", [Image((0,)), Text(f" {name}")], [image], meta))
    return folder


def task(folder: Path, **options: Any) -> BindingTask:
    source = SourceSpec(path=str(folder))
    given: dict[str, Any] = {"names_source": source} if not options.get("own_names") else {}
    spec = TaskSpec(
        kind="binding", source=source, question="", lead=" ", output="rank", queries=None, **given, **options
    )
    built = build_task("things", spec)
    assert isinstance(built, BindingTask)
    return built


def test_classes_keep_their_own_names(tmp_path: Path) -> None:
    built = task(write_things(tmp_path), own_names=True, ways=5, min_images=3)
    assert len(built.query_ids()) == len(NAMES) * len(SOURCES)
    for query in built.query_ids():
        episode = built.episode(query, 2, 0)
        assert len(set(episode.candidates)) == 5
        assert set(episode.candidates) <= set(NAMES)
        assert episode.golds == (episode.query.answer,)
        assert {turn.answer for turn in episode.demos} == set(episode.candidates)
        for turn, demo in zip(episode.demos, episode.demo_ids, strict=True):
            assert demo.endswith(f"={turn.answer}")
    assert built.baselines(built.query_ids()).chance == 0.2


def test_classes_of_one_name_are_never_in_one_episode(tmp_path: Path) -> None:
    built = task(write_things(tmp_path), own_names=True, min_images=3)
    pool = [example for images in built._classes.values() for example in images]

    def renamed(example: Example) -> Example:
        return replace(example, golds=("crane",)) if example.label in ("crane", "crane fly", "cat") else example

    again = BindingTask("things", built._spec, [renamed(example) for example in pool], [])
    candidates = {again.episode(query, 1, 0).candidates for query in again.query_ids()}
    assert all(len(set(pair)) == 2 for pair in candidates)


def test_only_one_source_is_asked_and_never_shown(tmp_path: Path) -> None:
    folder = write_things(tmp_path)
    built = task(folder, ask="open", min_images=3)
    assert len(built.query_ids()) == len(NAMES)
    assert built.max_shots() == 3
    images = {example.id: example for shown in built._classes.values() for example in shown}
    for query in built.query_ids():
        assert images[query].kind == "open"
        episode = built.episode(query, 3, 0)
        assert {images[demo.split("=")[0]].kind for demo in episode.demo_ids} == set(SOURCES) - {"open"}
    assert task(folder, min_images=3).max_shots() == 3  # all four, less the query
    with pytest.raises(UserError, match=r"ask=apple names no kind of image .*; kinds are fluent, noto, open, two"):
        task(folder, ask="apple", min_images=3)
    with pytest.raises(UserError, match="only 0 classes of at least 4 images"):
        task(folder, ask="open", min_images=4)
    with pytest.raises(UserError, match="own_names is set, so names and names_source have no effect"):
        build_task("x", TaskSpec(kind="binding", own_names=True, names=["a", "b"]))


def test_the_tasks_of_a_collection(tmp_path: Path) -> None:
    """The YAMLs are read, and refer to the folders that `python -m data prepare labelled` writes."""
    config = load_config(["model=m", f"data={tmp_path}", "task=[labelled_binding,labelled_names,labelled_naming]"])
    write_things(tmp_path / "labelled" / "heldout" / "things")
    write_things(tmp_path / "labelled" / "heldout" / "sources")
    for name, most in (("labelled_binding", 3), ("labelled_names", 3), ("labelled_naming", 3)):
        spec = replace(config.task[name], min_images=3, ways=min(config.task[name].ways, 6))
        assert build_task(name, spec).max_shots() == most
