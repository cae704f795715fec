"""Finished runs read again: from a folder to results and samples, and whether the two still agree."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.reports.results import groups_of, sample_of, samples_text, summary
from eval.samples import Sample
from eval.task import Baselines
from flamingo.errors import UserError


@dataclass(frozen=True)
class SavedRun:
    """A folder that `python -m eval` wrote."""

    folder: Path
    results: dict[str, Any]
    samples: list[Sample]

    @property
    def name(self) -> str:
        """What a plot calls it."""
        return self.folder.name


def read_run(folder: str | Path) -> SavedRun:
    """Results and samples of a folder.

    Raises:
        UserError: a file is missing or cannot be read; names it, and the line.
    """
    place = Path(folder)
    for name in ("results.json", "samples.jsonl"):
        if not (place / name).is_file():
            raise UserError(f"{place} has no {name}; give a folder that `python -m eval` wrote to its end")
    try:
        results = json.loads((place / "results.json").read_text())
    except ValueError as error:
        raise UserError(f"{place / 'results.json'} cannot be read: {error}") from None
    if not isinstance(results, dict) or "rows" not in results:
        raise UserError(f"{place / 'results.json'} holds no results of an evaluation")
    samples = []
    for number, line in enumerate((place / "samples.jsonl").read_text().splitlines(), start=1):
        try:
            samples.append(sample_of(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            where = f"{place / 'samples.jsonl'}: line {number}"
            raise UserError(
                f"{where} is no sample ({type(error).__name__}: {error}); run the evaluation again"
            ) from None
    return SavedRun(place, results, samples)


def problems(run: SavedRun) -> list[str]:
    """What is wrong with a run, in sentences; empty if its results are complete and follow from its samples."""
    found = _missing(run)
    rows = {(r["task"], r.get("strategy", "plain"), r["shots"], r["images"]): r for r in run.results["rows"]}
    groups = groups_of(run.samples)
    found += [f"results.json has no row for {_title(key)}" for key in groups.keys() - rows.keys()]
    found += [f"samples.jsonl has no sample of {_title(key)}" for key in rows.keys() - groups.keys()]
    for key in sorted(rows.keys() & groups.keys()):
        row = rows[key]
        metrics = run.results.get("tasks", {}).get(key[0], {}).get("definition", {}).get("metrics", ())
        again = summary(groups[key], Baselines(row["chance"], row["constant"], row["constant_answer"]), metrics)
        wrong = sorted(name for name in again if name in row and not _same(again[name], row[name]))
        found += [f"{_title(key)}: {name} is {row[name]}, its samples give {again[name]}" for name in wrong]
        short = row["prompts_cut"]
        if short == row["n"]:
            found.append(f"{_title(key)}: no prompt held all its demonstrations; the number of shots is a wrong label")
    told = run.results.get("samples", {}).get("sha256")
    if told is not None and told != hashlib.sha256(samples_text(run.samples).encode()).hexdigest():
        found.append("samples.jsonl is not the file that results.json was written with (its SHA-256 differs)")
    return found


def _missing(run: SavedRun) -> list[str]:
    """Queries that were asked twice, or not in every setting."""
    found = []
    seen: dict[tuple[Any, str], int] = {}
    queries: dict[str, set[str]] = {}
    for sample in run.samples:
        seen[sample.cell, sample.query_id] = seen.get((sample.cell, sample.query_id), 0) + 1
        queries.setdefault(sample.cell.task, set()).add(sample.query_id)
    twice = [key for key, count in seen.items() if count > 1]
    if twice:
        found.append(f"{len(twice)} samples are there more than once, first {twice[0][1]} of {twice[0][0].task}")
    by_cell: dict[Any, set[str]] = {}
    for cell, query_id in seen:
        by_cell.setdefault(cell, set()).add(query_id)
    for cell, asked in by_cell.items():
        lost = sorted(queries[cell.task] - asked)
        if lost:
            found.append(
                f"{cell.task}, {cell.shots} shots, seed {cell.seed}: {len(lost)} queries lack, first {lost[0]}"
            )
    seeds = {cell.seed for cell in by_cell}
    if by_cell and seeds != set(run.results.get("seeds", seeds)):
        found.append(f"results.json names the seeds {run.results['seeds']}, the samples have {sorted(seeds)}")
    for name, task in run.results.get("tasks", {}).items():
        if task.get("queries", len(queries.get(name, ()))) != len(queries.get(name, ())):
            found.append(f"{name}: {task['queries']} queries were asked, the samples have {len(queries.get(name, ()))}")
    return found


def _title(key: Sequence[Any]) -> str:
    task, strategy, shots, images = key
    return f"{task}, {strategy}, {shots} shots, images {images}"


def _same(a: Any, b: Any) -> bool:
    """Equal but for the last bits of numbers and for lists that were tuples."""
    if isinstance(a, float | int) and isinstance(b, float | int):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
