"""VL-ICL Bench's files, in small: what each task shows, asks and counts as right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from eval.compose import load_config
from eval.metrics.text import SCORES
from eval.task import Task
from eval.tasks.build import build_task
from flamingo.errors import UserError
from tests.fixtures import random_image

FOLDERS = {
    "vl_icl_textocr": "textocr",
    "vl_icl_clevr": "clevr",
    "vl_icl_operator": "operator_induction",
    "vl_icl_operator_interleaved": "operator_induction_interleaved",
    "vl_icl_matching": "matching_mi",
}


def write(root: Path, folder: str, queries: list[dict[str, Any]], support: list[dict[str, Any]]) -> None:
    (root / folder).mkdir(parents=True)
    names = re.findall(r"[\w/]+\.png", json.dumps([queries, support]))
    for seed, name in enumerate(dict.fromkeys(names)):
        random_image("RGB", (24, 24), seed + 7).save(root / name)
    (root / folder / "query.json").write_text(json.dumps(queries))
    (root / folder / "support.json").write_text(json.dumps(support))


def data(folder: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Entries as the benchmark's code reads them."""

    def images(kind: str, number: int, count: int) -> list[str]:
        return [f"{folder}/{kind}{number}{part}.png" for part in "ab"[:count]]

    pairs = 1 + folder.endswith(("interleaved", "mi"))
    if folder == "matching_mi":
        parts = {"same": "yes", "diff": "no"}
        support: list[dict[str, Any]] = [
            {p: {"image": images(f"s{p}", at, 2), "question": "", "answer": a} for p, a in parts.items()}
            for at in range(4)
        ]
        answers = ["yes", "no"]
        return [
            {"id": at, "image": images("q", at, 2), "question": "Q", "answer": answers[at]} for at in range(2)
        ], support
    if folder.startswith("operator"):
        support = [
            {"id": at, "image": images("s", at, pairs), "question": "R?", "answer": [at + 2, at - 2, at * 2]}
            for at in range(5)
        ]
        return [
            {"id": at, "image": images("q", at, pairs), "question": "R?", "answer": 9 + at, "operator": "+-x"[at]}
            for at in range(3)
        ], support
    support = [{"id": at, "image": images("s", at, 1), "question": f"Q{at}", "answer": at} for at in range(5)]
    return [{"id": at, "image": images("q", at, 1)[0], "question": "Q", "answer": "AB"} for at in range(3)], support


def task_of(name: str, root: Path) -> Task:
    spec = load_config(["model=none", f"task={name}"]).task[name]
    spec.root = str(root)
    return build_task(name, spec)


@pytest.mark.parametrize("name", FOLDERS)
def test_prompts_are_the_benchmarks(name: str, tmp_path: Path) -> None:
    folder = FOLDERS[name]
    queries, support = data(folder)
    write(tmp_path, folder, queries, support)
    task = task_of(name, tmp_path)
    assert sorted(task.query_ids()) == [f"query {row['id']}" for row in queries]
    for row in queries:
        episode = task.episode(f"query {row['id']}", 2, 0)
        several = isinstance(row["image"], list) and len(row["image"]) == 2
        assert len(episode.query.images) == 1 + several
        assert episode.query.question_text.endswith(f"{row['question']}\nAnswer:")
        assert episode.golds == (str(row["answer"]),)
        assert episode.query.lead == " "
        assert episode.frame.prefix.endswith("\n")
        assert len(episode.demos) == 2
        for demo, demo_id in zip(episode.demos, episode.demo_ids, strict=True):
            entry = support[0]  # every image and answer is its own entry's
            at = re.fullmatch(r"support (\d+)(?:\.(.+))?", demo_id)
            assert at is not None
            entry = support[int(at[1])]
            if "operator" in row:
                assert at[2] == row["operator"]
                assert demo.answer == str(entry["answer"]["+-x".index(row["operator"])])
            elif folder == "matching_mi":
                assert demo.answer == entry[at[2]]["answer"]
                entry = entry[at[2]]
            else:
                assert demo.answer == str(entry["answer"])
            assert [image.frames[0] for image in demo.images] == [(tmp_path / f).read_bytes() for f in entry["image"]]
        if folder == "matching_mi":
            assert sorted(demo.answer for demo in episode.demos) == ["no", "yes"]


@pytest.mark.parametrize(
    ("score", "answer", "gold", "right"),
    [
        ("accuracy", "Stop", "STOP", 1),
        ("accuracy", "Stop it", "STOP", 0),
        ("first_number", "The result is 12", "12", 1),
        ("first_number", "12 or 13", "13", 0),
        ("first_number", "-3", "-3", 0),  # its rule finds digits alone
        ("first_number", "none", "3", 0),
        ("says_yes", "Yes it does", "yes", 1),
        ("says_yes", "never", "no", 1),
        ("says_yes", "yes", "no", 0),
    ],
)
def test_scores_are_the_benchmarks(score: str, answer: str, gold: str, right: int) -> None:
    assert SCORES[score](answer, [gold]) == right


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answer": [1, 2]}, "the results of +, -, x"),
        ({"image": []}, "a list of at least one text"),
        ({"image": ["operator_induction/none.png"]}, "images are missing"),
        ({"image": ["../outside.png"]}, "outside the folder"),
        ({"support": {"cat": {"images": []}}}, "open-ended MiniImageNet"),
    ],
)
def test_other_files_are_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    queries, support = data("operator_induction")
    write(tmp_path, "operator_induction", queries, support)
    (tmp_path / "operator_induction" / "support.json").write_text(json.dumps([*support[1:], support[0] | change]))
    with pytest.raises(UserError, match=re.escape(sentence)):
        task_of("vl_icl_operator", tmp_path)


def test_an_unknown_operator_is_refused(tmp_path: Path) -> None:
    queries, support = data("operator_induction")
    write(tmp_path, "operator_induction", [queries[0] | {"operator": "/"}], support)
    with pytest.raises(UserError, match="must be one of"):
        task_of("vl_icl_operator", tmp_path)
