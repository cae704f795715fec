"""From a task's YAML to a task, with every check that needs no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from data.records import read_json
from eval.demonstrations.samplers import parse_sampler
from eval.metrics.stems import Stems
from eval.metrics.table import check_metric
from eval.metrics.wordnet import wordnet_if_there
from eval.spec import VECTOR_KINDS, TaskSpec
from eval.task import Example, Task
from eval.tasks.binding import BindingTask
from eval.tasks.examples import ExampleTask
from eval.tasks.formats.files import below_root
from eval.tasks.formats.questions import stem_pairs
from eval.tasks.sources import chosen_support, read_examples, read_names
from flamingo.configs.validate import examine, refuse
from flamingo.errors import UserError


def check_spec(name: str, spec: TaskSpec) -> None:
    """Raise UserError for impossible settings, and for metrics whose programs are missing here."""
    _, clauses = examine(TaskSpec, asdict(spec), f"task.{name}")
    try:
        parse_sampler(spec.demos)
    except UserError as error:
        clauses.append(f"task.{name}.{error}")
    refuse(clauses)
    for metric in spec.metrics:
        check_metric(metric)


def build_task(name: str, spec: TaskSpec) -> Task:
    """Read the task's data. Raises UserError in one sentence for what is wrong with it."""
    if spec.kind in VECTOR_KINDS:
        raise UserError(f"task {name} of kind {spec.kind} is for an encoder of images and texts: use python -m eval")
    check_spec(name, spec)
    examples = read_examples(name, spec, spec.source)
    if spec.kind == "examples":
        shown = None if spec.support is None else read_examples(name, spec, spec.support)
        vocabulary = vocabulary_of(name, spec, examples if shown is None else shown)
        support = None if shown is None else chosen_support(name, spec, shown)
        return ExampleTask(name, spec, examples, support, vocabulary=vocabulary, stems=stems_of(name, spec))
    names = list(spec.names)
    if not names and spec.names_source is not None:
        names = read_names(name, spec.names_source)
    return BindingTask(name, spec, examples, names)


def check_shots(tasks: Mapping[str, Task], shots: list[int]) -> None:
    """Raise UserError when a task's data cannot give as many demonstrations as are asked for."""
    for name, task in tasks.items():
        if max(shots) > task.max_shots():
            raise UserError(
                f"shots={max(shots)} is more than the {task.max_shots()} that task {name} allows; use fewer shots, "
                f"more data, or a lower task.{name}.queries, which leaves more to show"
            )


def vocabulary_of(name: str, spec: TaskSpec, shown: Sequence[Example]) -> list[str]:
    """Return the candidates that `candidates_from` names, sorted; [] where it names none.

    Raises:
        UserError: the file cannot be read, or no answer is frequent enough.
    """
    where = spec.candidates_from
    if not where:
        return []
    if where.startswith("support:"):
        least = where.removeprefix("support:")
        if not least.isdecimal() or int(least) < 1:
            raise UserError(f"task.{name}.candidates_from={where}: give a count of 1 or more, as in support:2")
        counts = Counter(gold for example in shown for gold in example.golds)
        frequent = sorted(answer for answer, count in counts.items() if count >= int(least) and answer)
        if not frequent:
            raise UserError(
                f"task.{name}.candidates_from={where}: no answer in the support set is that frequent; lower it"
            )
        return frequent
    listed = read_json(Path(spec.root) / where)
    if not isinstance(listed, list | dict) or not listed:
        raise UserError(
            f"task.{name}.candidates_from={where} is neither a list of answers nor an object with answers as keys"
        )
    return sorted({str(answer) for answer in listed})


def stems_of(name: str, spec: TaskSpec) -> Stems | None:
    """Return the stems that `stem` asks for, from all annotation files of the task."""
    if not spec.stem:
        return None
    sources = [below_root(source, spec.root) for source in (spec.source, spec.support) if source is not None]
    files = [Path(source.annotations) for source in sources if source.annotations]
    if not files:
        raise UserError(f"task.{name}.stem={spec.stem} needs source.annotations, which is not set")
    return Stems((pair for file in files for pair in stem_pairs(file)), wordnet_if_there())
