"""Finished runs: checked against their samples, compared, exported, shown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.__main__ import main
from eval.reports.compare import compare, compare_samples, mcnemar, sign_flip
from eval.reports.results import results_of, write_report
from eval.reports.saved_run import problems, read_run
from eval.reports.submissions import read_ids, submission
from eval.runner import Grid, run
from eval.spec import TaskSpec
from eval.task import Task
from eval.tasks.examples import ExampleTask
from flamingo.errors import UserError
from tests.eval.worlds import Constant, Looker, colour_examples

FACTS = {"model": {"name": "m", "sha256": "0" * 64}, "date": "2026-01-01", "code": "c", "device": "cpu", "wall_s": 1.0}
REFERENCE = {"paper": "2308.01390 T11", "model": "OF-9B", "shots": {0: 37.8, 4: 40.1}}


def write(folder: Path, model: Looker | Constant, demos: str = "random", shots: list[int] | None = None) -> Path:
    spec = TaskSpec(lead=" ", queries=30, demos=demos, output="rank", candidates=["red", "green", "blue", "grey"])
    examples = [replace(d, id=str(1000 + i)) for i, d in enumerate(colour_examples(90))]
    task = ExampleTask("colours", spec, examples)
    task.description["reference"] = REFERENCE
    tasks: dict[str, Task] = {"colours": task}
    grid = Grid(shots or [0, 4], [0, 1], ["real"], batch_size=8)
    samples, cache = run(tasks, grid, model)
    write_report(folder, results_of(samples, tasks, grid.description(), FACTS | {"images": cache.counts()}), samples)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    return write(root / "random", Looker()), write(root / "rices", Looker(), "rices_image")


def test_a_run_read_again_is_the_run(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(read_run(folders[0])) == []
    assert main(["check", *map(str, folders)]) == 0
    assert capsys.readouterr().out.count("120 samples, 2 rows, all follow") == 2


def _drop(lines: list[dict[str, Any]], results: dict[str, Any]) -> None:
    del lines[3]


def _twice(lines: list[dict[str, Any]], results: dict[str, Any]) -> None:
    lines.append(lines[0])


def _better(lines: list[dict[str, Any]], results: dict[str, Any]) -> None:
    results["rows"][0]["score"] = 0.99


def _edited(lines: list[dict[str, Any]], results: dict[str, Any]) -> None:
    lines[0]["raw"] = "something else"


def _no_row(lines: list[dict[str, Any]], results: dict[str, Any]) -> None:
    del results["rows"][0]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_drop, "1 queries are missing"),
        (_twice, "1 samples occur more than once"),
        (_better, "score is 0.99, its samples give"),
        (_edited, "SHA-256 differs"),
        (_no_row, "no row for colours, plain, 0 shots"),
    ],
)
def test_what_does_not_follow_is_found(
    folders: tuple[Path, Path],
    tmp_path: Path,
    damage: Callable[..., None],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [json.loads(line) for line in (folders[0] / "samples.jsonl").read_text().splitlines()]
    results = json.loads((folders[0] / "results.json").read_text())
    damage(lines, results)
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert any(said in sentence for sentence in problems(read_run(tmp_path)))
    assert main(["check", str(tmp_path)]) == 1
    assert said in capsys.readouterr().out


def test_a_paired_comparison(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = map(read_run, folders)
    found = {one.shots: one for one in compare(first, second)}
    assert found[0].difference == 0.0
    assert (found[0].p, found[0].n_needed, found[0].same_demonstrations) == (1.0, None, True)
    four = found[4]
    assert four.n == 30
    assert four.scores[1] == 1.0  # the nearest images always show the colour
    assert four.difference == pytest.approx(four.scores[1] - four.scores[0])
    assert four.interval[0] <= four.difference <= four.interval[1]
    assert (four.p < 0.05) == (four.interval[0] > 0)
    assert not four.same_demonstrations
    assert main(["compare", *map(str, folders)]) == 0
    said = capsys.readouterr().out
    assert "colours is defined differently: demos, retrieval" in said
    assert "different" in said


def test_the_interval_of_a_difference_is_of_two_levels(folders: tuple[Path, Path]) -> None:
    """Against plain loops: draw seeds, draw images, take the mean difference; the runs differ by seed."""
    samples = [one for one in read_run(folders[0]).samples if one.cell.shots == 4]
    rng = np.random.default_rng(0)
    queries, seeds = sorted({one.query_id for one in samples}), (0, 1)
    change = {(q, s): (0.0, 0.5)[s] + float(rng.normal(0, 0.2)) for q in queries for s in seeds}
    moved = [replace(one, score=one.score + change[one.query_id, one.cell.seed]) for one in samples]
    found = compare_samples(samples, moved)
    means = []
    for _ in range(4000):
        images, drawn = rng.integers(len(queries), size=len(queries)), rng.integers(2, size=2)
        means.append(np.mean([[change[queries[q], s] for q in images] for s in drawn]))
    assert found.interval == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.02)
    assert found.interval_method == "two-level bootstrap"
    assert found.interval[1] - found.interval[0] > 0.4  # over images alone it would be 0.1
    one_seed = [[s for s in group if s.cell.seed == 0] for group in (samples, moved)]
    assert compare_samples(*one_seed).interval_method == "bootstrap"
    other = compare_samples(one_seed[0], moved)
    assert other.interval_method == "bootstrap"
    assert other.interval[0] <= other.difference <= other.interval[1]


def test_only_the_same_queries_are_compared(folders: tuple[Path, Path], tmp_path: Path) -> None:
    samples = read_run(folders[0]).samples
    half = [sample for sample in samples if sample.cell.shots == 4]
    with pytest.raises(UserError, match="1 queries are in only one run"):
        compare_samples(half, [s for s in half if s.query_id != half[0].query_id])
    with pytest.raises(UserError, match="different gold answers"):
        compare_samples(half, [replace(sample, golds=("mauve",)) for sample in half])
    with pytest.raises(UserError, match=r"have no setting .* in common"):
        compare(read_run(folders[0]), read_run(write(tmp_path / "other", Looker(), shots=[2])))


def test_the_tests_know_chance_from_difference() -> None:
    rng = np.random.default_rng(0)
    clusters = [str(i) for i in range(200)]
    ps = [sign_flip(rng.integers(-1, 2, 200).astype(float), clusters) for _ in range(60)]
    assert 0.3 < float(np.mean(ps)) < 0.7
    assert sum(p < 0.05 for p in ps) <= 8
    assert sign_flip(np.ones(50), clusters[:50]) < 1e-3
    # One image with fifty questions is one observation.
    assert sign_flip(np.ones(50), ["one"] * 50) == 1.0
    a, b = np.array([1.0] * 10 + [0.0] * 10), np.array([1.0] * 10 + [1.0] * 9 + [0.0])
    assert mcnemar(a, b) == pytest.approx(2 * 0.5**9)
    assert mcnemar(a, b / 2) is None


def test_files_for_servers(folders: tuple[Path, Path], tmp_path: Path) -> None:
    samples = [s for s in read_run(folders[0]).samples if (s.cell.shots, s.cell.seed) == (4, 0)]
    entries = submission(samples, "vqa")
    assert entries[0] == {"question_id": int(samples[0].query_id), "answer": samples[0].answer}
    assert {"image_id", "caption"} == submission(samples, "captions")[0].keys()
    questions = tmp_path / "questions.json"
    ids = [int(sample.query_id) for sample in samples]
    questions.write_text(json.dumps({"questions": [{"question_id": i} for i in [*ids[::-1], 77]]}))
    arguments = ["export", str(folders[0]), "format=vqa", f"ids={questions}", f"to={tmp_path / 'out.json'}"]
    assert main([*arguments, "shots=4", "seed=0", "pad=true"]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert [entry["question_id"] for entry in written] == [*ids[::-1], 77]
    assert written[-1]["answer"] == ""
    with pytest.raises(UserError, match="1 questions in the file of ids= have no answer, first 77"):
        submission(samples, "vqa", read_ids(str(questions), "vqa"))
    with pytest.raises(UserError, match="no question in the file of ids="):
        submission(samples, "vqa", ["77"], pad=True)
    with pytest.raises(UserError, match="several answers"):
        submission(read_run(folders[0]).samples, "vqa")
    with pytest.raises(UserError, match="contains no image"):
        read_ids(str(questions), "vizwiz")


def test_a_report_of_two_runs_is_one_page(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert main(["report", *map(str, folders), f"out={tmp_path}"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert page.count("data:image/png;base64,") == 2
    assert page.count("<h2>") == 3
    assert "leaks refused" in page
    assert 'class="bad"' not in page
    for name in ("curve.png", "risk.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "report needs a folder"),
        (["report", "/nowhere"], "/nowhere has no results.json"),
        (["compare", "a"], "compare needs two folders, got 1"),
        (["check", "a", "b=c"], "unknown key 'b'; the keys are none"),
        (["export", "a", "format=vqa"], "to=FILE"),
        (["export", "a", "format=x", "to=y"], "format=x: use one of vqa, vizwiz, captions"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_line_that_is_no_sample_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text((folders[0] / "results.json").read_text())
    (tmp_path / "samples.jsonl").write_text((folders[0] / "samples.jsonl").read_text() + '{"task": "x"}\n')
    with pytest.raises(UserError, match=r"samples.jsonl: line 121 is not a sample"):
        read_run(tmp_path)
