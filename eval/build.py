"""From a task's YAML to a task, everything checked that can be checked without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from eval.binding import BindingTask
from eval.demos import parse_sampler
from eval.documents import DocumentTask
from eval.metrics.table import METRICS, NEEDS_RANKING
from eval.metrics.text import SCORE_NAMES
from eval.sources import read_documents, read_names, read_support
from eval.task import Task, TaskSpec
from flamingo.errors import UserError

CHOICES: dict[str, tuple[str, ...]] = {
    "kind": ("documents", "binding"),
    "output": ("generate", "rank"),
    "metric": SCORE_NAMES,
    "options": ("lines", "inline"),
    "answer_as": ("text", "letter"),
    "demo_answer": ("first", "majority"),
    "zero_shot": ("none", "two_text", "two_text_first_picture"),
}
POSITIVE = ("queries", "max_new_tokens", "min_pictures", "support_size", "num_beams")


def check_spec(name: str, spec: TaskSpec) -> None:
    """Raise UserError for a value that no task can have, naming its key."""
    assert {f.name for f in fields(spec)} >= {*CHOICES, *POSITIVE}
    for key, allowed in CHOICES.items():
        if getattr(spec, key) not in allowed:
            raise UserError(f"task.{name}.{key} is {getattr(spec, key)!r}; use one of {', '.join(allowed)}")
    try:
        parse_sampler(spec.demos)
    except UserError as error:
        raise UserError(f"task.{name}.{error}") from None
    for key in POSITIVE:
        if getattr(spec, key) is not None and getattr(spec, key) < 1:
            raise UserError(f"task.{name}.{key} is {getattr(spec, key)}; it must be at least 1")
    unknown = sorted(set(spec.metrics) - METRICS.keys())
    if unknown:
        raise UserError(f"task.{name}.metrics has {unknown[0]!r}; the metrics are {', '.join(METRICS)}")
    ranked = sorted(NEEDS_RANKING.intersection(spec.metrics))
    if ranked and spec.output != "rank":
        raise UserError(f"task.{name}.metrics has {ranked[0]}, which compares candidates; set task.{name}.output=rank")
    if not spec.end_of_chunk and not spec.separator:
        raise UserError(f"task.{name}.separator is empty and end_of_chunk is false; a demonstration needs an end")
    if spec.ways < 2:
        raise UserError(f"task.{name}.ways is {spec.ways}; a choice needs at least 2")


def build_task(name: str, spec: TaskSpec) -> Task:
    """Read the task's data. Raises UserError in one sentence for what is wrong with it."""
    check_spec(name, spec)
    documents = read_documents(name, spec, spec.source)
    if spec.kind == "documents":
        support = None if spec.support is None else read_support(name, spec, spec.support)
        return DocumentTask(name, spec, documents, support)
    names = list(spec.names)
    if not names and spec.names_source is not None:
        names = read_names(name, spec.names_source)
    return BindingTask(name, spec, documents, names)


def check_shots(tasks: Mapping[str, Task], shots: list[int]) -> None:
    """Raise UserError when a task's data cannot give as many demonstrations as are asked for."""
    for name, task in tasks.items():
        if max(shots) > task.max_shots():
            raise UserError(
                f"shots={max(shots)} is more than task {name} can give: its data allow {task.max_shots()}; use fewer "
                f"shots, more data, or a lower task.{name}.queries, which leaves more to show"
            )
