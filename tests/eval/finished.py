"""Folders of finished runs with answers that a test has thought of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from eval.reports.results import groups_of, summary, write_report
from eval.samples import Cell, Sample
from eval.task import Baselines

_BLANK = Sample(
    cell=Cell("talk", 0, 0, "real"),
    query_id="",
    demo_ids=(),
    turns=(),
    raw="",
    answer="",
    golds=("gold",),
    score=0.0,
)


def sample(query: str, answer: str, **more: object) -> Sample:
    """An answered question, without an image if `turns` show none."""
    turns = ((None, f"What about {query}?"),)
    values = {"query_id": query, "raw": answer, "answer": answer, "cluster": query, "turns": turns}
    return replace(_BLANK, **(values | more))  # type: ignore[arg-type]


def write_run(folder: Path, samples: Sequence[Sample], command: Sequence[str] = ()) -> Path:
    """Write the run as an evaluation would have left it."""
    rows = [summary(group, Baselines(None, None, None)) for group in groups_of(samples).values()]
    write_report(folder, {"rows": rows, "tasks": {}, "command": ["python", "-m", "eval", *command]}, samples)
    return folder


def write_answers(folder: Path, answers: Mapping[str, str]) -> Path:
    """Write a run from query ids to answers."""
    return write_run(folder, [sample(query, answer) for query, answer in answers.items()])
