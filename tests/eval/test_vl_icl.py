"""VL-ICL Bench's files and SMMILE's, in small: what each task shows, asks and counts as right."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval.compose import load_config
from eval.metrics.text import SCORES
from eval.runner import Grid, run
from eval.spec import SourceSpec
from eval.task import Task
from eval.tasks.build import build_task
from flamingo.errors import UserError
from tests.eval.worlds import Constant, Looker
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
        ({"support": {"cat": {"images": []}}}, "has no 'classes'"),
        ({"support": {}, "classes": ["4", "b"], "answer": "4"}, "has no '4'"),
        ({"support": {}, "classes": ["a", "b"], "answer": "c"}, "one of its classes"),
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


BARE = {"id": 9, "image": ["open_mi/q9.png"], "question": "This is a", "answer": "dax"}
CLASSES = ["dax", "blicket", "perpo", "slation", "shously"]


def open_ended(count: int = 3, **changes: Any) -> list[dict[str, Any]]:
    """Queries of open-ended MiniImageNet, as the benchmark's code reads them."""
    return [
        {
            "id": at,
            "image": [f"open_mi/q{at}.png"],
            "question": "This is a",
            "answer": CLASSES[at],
            "classes": CLASSES,
            "support": {c: {"images": [f"open_mi/s{at}{c}{n}.png" for n in range(5)]} for c in CLASSES},
        }
        | changes
        for at in range(count)
    ]


def open_mi(root: Path, queries: list[dict[str, Any]], **settings: Any) -> Task:
    if not (root / "open_mi").exists():
        write(root, "open_mi", queries, [BARE])
    spec = load_config(["model=none", "task=vl_icl_open_mi"]).task["vl_icl_open_mi"]
    spec.root = str(root)
    return build_task("vl_icl_open_mi", replace(spec, **settings))


def test_open_ended_queries_show_what_they_bring(tmp_path: Path) -> None:
    queries = open_ended()
    task = open_mi(tmp_path, queries)
    assert task.max_shots() == 10  # two classes of five
    others: set[str] = set()
    for at, row in enumerate(queries):
        episode = task.episode(f"query {at}", 10, 0)
        assert (episode.query.question, episode.golds) == ("This is a\nAnswer:", (row["answer"],))
        counts = Counter(demo.answer for demo in episode.demos)
        assert counts.pop(row["answer"]) == 5
        assert list(counts.values()) == [5]
        others |= counts.keys()
        for demo in episode.demos:
            files = row["support"][demo.answer]["images"]
            assert demo.image is not None
            assert demo.image.frames[0] in [(tmp_path / file).read_bytes() for file in files]
        assert len({demo.image.sha256 for demo in episode.demos if demo.image}) == 10
        rounds = [{a.answer, b.answer} for a, b in zip(episode.demos[::2], episode.demos[1::2], strict=True)]
        assert rounds == [{row["answer"], *counts}] * 5
        assert task.episode(f"query {at}", 4, 0).demos == episode.demos[-4:]
    assert len(others) > 1  # the other class is drawn for each query
    assert open_mi(tmp_path, queries, ways=5).max_shots() == 25
    moved = [row | {"support": queries[at - 1]["support"]} for at, row in enumerate(queries)]
    (tmp_path / "open_mi" / "query.json").write_text(json.dumps(moved))
    assert open_mi(tmp_path, moved).hash != task.hash  # what a query brings is part of the task


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"demos": "rices_image"}, "set demos to one of given, random, balanced"),
        ({"support": SourceSpec(format="vl_icl", path="open_mi/support.json", images=".")}, "leave out support="),
        ({"ways": 6}, "ways=6: query query 0 brings 5 classes"),
    ],
)
def test_demonstrations_that_queries_bring_are_not_mixed(
    settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        open_mi(tmp_path, open_ended(1), **settings)


def test_some_bring_and_others_do_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="query query 9 brings no demonstrations, which others do"):
        open_mi(tmp_path, [*open_ended(1), BARE])
    (tmp_path / "open_mi" / "query.json").write_text(json.dumps([BARE]))
    with pytest.raises(UserError, match="shows what each query brings, and these bring nothing"):
        open_mi(tmp_path, [], demos="given")
    (tmp_path / "open_mi" / "s0perpo3.png").unlink()
    (tmp_path / "open_mi" / "query.json").write_text(json.dumps(open_ended(1)))
    with pytest.raises(UserError, match=r"1 of 26 images are missing, the first is .*s0perpo3\.png"):
        open_mi(tmp_path, [])


def problem(name: str, *answers: str, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "problem_id": name,
            "order": at,
            "image": {"bytes": encoded(hash_of(name, at)), "path": None},
            "question": f"What is {at}?",
            "answer": answer,
            "speciality": "Radiology",
        }
        for at, answer in enumerate(answers, start)
    ]


def hash_of(name: str, at: int) -> int:
    return sum(map(ord, name)) * 100 + at


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    random_image("RGB", (24, 24), seed).save(buffer, format="PNG")
    return buffer.getvalue()


def smmile(folder: Path, rows: list[dict[str, Any]], *settings: str) -> Task:
    parquet = pytest.importorskip("pyarrow.parquet", reason="SMMILE's files are parquet, which needs pyarrow")
    import pyarrow

    (folder / "data").mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data" / "train-00000-of-00001.parquet")
    words = ["model=none", "task=smmile", f"task.smmile.source.path={folder}", *settings]
    return build_task("smmile", load_config(words).task["smmile"])


def test_a_problem_of_smmile_is_shown_in_its_order(tmp_path: Path) -> None:
    rows = [*problem("a", "Gout", "Lupus", "Gout", "Gout."), *problem("b", "yes", "no", start=1)]
    task = smmile(tmp_path, rows[::-1])
    assert sorted(task.query_ids()) == ["a", "b"]
    assert task.max_shots() == 3
    first, second = (task.episode(name, 3, 0) for name in "ab")
    assert (first.query.question, first.golds, first.kind) == (
        "Question: What is 3?\nAnswer:",
        ("Gout.",),
        "Radiology",
    )
    assert [demo.answer for demo in first.demos] == ["Gout", "Lupus", "Gout"]
    assert [demo.question for demo in first.demos] == [f"Question: What is {at}?\nAnswer:" for at in range(3)]
    assert [demo.answer for demo in second.demos] == ["yes"]  # it brings no more
    assert [demo.answer for demo in task.episode("a", 2, 0).demos] == ["Lupus", "Gout"]
    assert task.score("gout", first) == 1
    assert task.baselines(["a", "b"]).constant == 0.5  # "Gout" is right, "yes" is not
    ranked = smmile(tmp_path, rows, "task.smmile.output=rank")
    assert ranked.episode("b", 1, 0).candidates == ("yes", "no")
    samples, _ = run({"smmile": task}, Grid([0, 3], [0], ["real"]), Constant("no"))
    assert [(s.query_id, s.cell.shots, s.shots_kept, s.score) for s in samples if s.query_id == "b"] == [
        ("b", 0, 0, 1.0),
        ("b", 3, 1, 1.0),
    ]


def test_shots_that_fit_for_one_problem_are_asked(tmp_path: Path) -> None:
    """Problems bring different numbers: the check of the context is about each one's own."""
    rows = [*problem("a", *"abcdef"), *problem("b", "yes", "no")]
    task = smmile(tmp_path, rows, "task.smmile.max_new_tokens=1")
    one = len("Question: What is 0?\nAnswer:") + 6
    samples, _ = run({"smmile": task}, Grid([5], [0], ["real"]), Looker(context=2 * one + 2))
    assert {s.query_id: (s.shots_kept, s.demos_dropped) for s in samples} == {"a": (1, 4), "b": (1, 0)}
    with pytest.raises(UserError, match="at most 0 of 5 demonstrations fit"):
        run({"smmile": task}, Grid([5], [0], ["real"]), Looker(context=one))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"order": 1}, "is the second of problem a with order 1"),
        ({"image": None}, "row 3 has null as 'image'"),
        ({"answer": None}, "has null as 'answer'"),
        ({"problem_id": "b"}, "is all of problem b, which has nothing to show"),
    ],
)
def test_other_rows_of_smmile_are_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    rows = problem("a", "x", "y", "z")
    with pytest.raises(UserError, match=re.escape(sentence)):
        smmile(tmp_path, [*rows[:2], rows[2] | change])


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [("Crohn's disease.", "crohns  disease", 1), ("no", "No!", 1), ("nodule", "no", 0), ("...", "!", 0)],
)
def test_smmiles_exact_match(answer: str, gold: str, right: int) -> None:
    assert SCORES["words_match"](answer, [gold]) == right
