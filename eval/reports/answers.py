"""The answers of one run, or of two to the same questions, for whoever rates or judges them: one answer a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eval.reports.saved_run import SavedRun
from eval.samples import Sample
from flamingo.errors import UserError

CHOICES = {"task": "task", "shots": "shots", "demo_seed": "seed", "strategy": "strategy"}
"""Settings that choose answers, and the field of a sample's cell that each is about."""
Pairs = dict[tuple[str, str], tuple[Sample, ...]]
"""(task, query id) to the answers of the runs, in their order."""


def answers_of(runs: Sequence[SavedRun], settings: Mapping[str, str]) -> Pairs:
    """Return the answers with real images that `settings` choose.

    Raises:
        UserError: none is left, a question has several in one run, or the runs were not asked the same.
    """
    found = [_answers(run, settings) for run in runs]
    first, *others = found
    for other, run in zip(others, runs[1:], strict=True):
        if only := sorted(first.keys() ^ other.keys()):
            raise UserError(
                f"{runs[0].folder} and {run.folder} were not asked the same: {len(only)} questions are in only one, "
                f"the first is {only[0][1]} of {only[0][0]}; give both runs the same tasks and limit"
            )
        for key, sample in first.items():
            if sample.turns[-1:] != other[key].turns[-1:] and _goes_on(runs[0], key[0]):
                raise UserError(
                    f"{runs[0].folder} and {run.folder} were not asked the same: with history=own each conversation of "
                    f"{key[0]} went on from its model's answers (question {key[1]}); give one run, or evaluate with "
                    "history=given"
                )
            if sample.golds != other[key].golds:
                raise UserError(
                    f"question {key[1]} of {key[0]} has other gold answers in the second run: the data differ"
                )
    return {key: tuple(answers[key] for answers in found) for key in first}


def _answers(run: SavedRun, settings: Mapping[str, str]) -> dict[tuple[str, str], Sample]:
    chosen = [sample for sample in run.samples if sample.cell.images == "real"]
    for setting, field in CHOICES.items():
        if setting in settings:
            chosen = [sample for sample in chosen if str(getattr(sample.cell, field)) == settings[setting]]
    if not chosen:
        raise UserError(f"{run.folder} has no answers with these settings")
    answers: dict[tuple[str, str], Sample] = {}
    for sample in chosen:
        key = sample.cell.task, sample.query_id
        if key in answers:
            raise UserError(
                f"{run.folder}: question {sample.query_id} of {sample.cell.task} has several answers; choose one with "
                f"{'=, '.join(CHOICES)}="
            )
        answers[key] = sample
    return answers


def _goes_on(run: SavedRun, task: str) -> bool:
    """Return whether later questions of a task show what the model itself answered."""
    return run.results.get("tasks", {}).get(task, {}).get("definition", {}).get("history") == "own"


def text_of(sample: Sample) -> str:
    """Return the answer as the model wrote it."""
    return sample.raw.strip() or sample.answer.strip()


def system_names(runs: Sequence[SavedRun]) -> list[str]:
    """Return what each run is called: its folder's name, or its path where two are called the same."""
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"{names[0]} is given twice; give two runs, or one")
    return names
