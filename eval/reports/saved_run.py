"""Finished runs: from a folder to results and samples, and whether the two agree."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.records import json_objects, parse_json
from eval.reports.results import groups_of, sample_of, samples_text, summary
from eval.samples import Sample
from eval.task import Baselines
from flamingo.errors import UserError

_ROW = "task shots images score interval chance constant constant_answer n prompts_cut score_by_kind"
_IN_ROWS = frozenset(_ROW.split())


@dataclass(frozen=True)
class SavedRun:
    """The results and samples in a folder that `python -m eval` wrote."""

    folder: Path
    results: dict[str, Any]
    samples: list[Sample]


def read_run(folder: str | Path) -> SavedRun:
    """Read the results and samples of a folder.

    Raises:
        UserError: a file is missing or cannot be read; the message names it and the line.
    """
    path = Path(folder)
    for name in ("results.json", "samples.jsonl"):
        if not (path / name).is_file():
            raise UserError(f"{path} has no {name}; give a folder that `python -m eval` wrote to its end")
    try:
        results = parse_json((path / "results.json").read_bytes())
    except ValueError as error:
        raise UserError(f"{path / 'results.json'} cannot be read: {error}") from None
    rows = results.get("rows") if isinstance(results, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= _IN_ROWS for row in rows):
        raise UserError(f"{path / 'results.json'} does not contain the results of an evaluation")
    samples = []
    for line_number, line in json_objects(path / "samples.jsonl"):
        try:
            samples.append(sample_of(line))
        except (ValueError, KeyError, TypeError) as error:
            where = f"{path / 'samples.jsonl'}: line {line_number}"
            raise UserError(
                f"{where} is not a sample ({type(error).__name__}: {error}); run the evaluation again"
            ) from None
    return SavedRun(path, results, samples)


def problems(run: SavedRun) -> list[str]:
    """Return what is wrong with a run, in sentences; empty if its results are complete and follow from its samples."""
    sentences = _missing(run)
    rows = {(r["task"], r.get("strategy", "plain"), r["shots"], r["images"]): r for r in run.results["rows"]}
    groups = groups_of(run.samples)
    sentences += [f"results.json has no row for {_title(key)}" for key in groups.keys() - rows.keys()]
    sentences += [f"samples.jsonl has no sample of {_title(key)}" for key in rows.keys() - groups.keys()]
    for key in sorted(rows.keys() & groups.keys()):
        row = rows[key]
        task = run.results.get("tasks", {}).get(key[0], {}).get("definition", {})
        baselines = Baselines(row["chance"], row["constant"], row["constant_answer"])
        again = summary(groups[key], baselines, task.get("metrics", ()), task.get("metric"))
        wrong = sorted(name for name in again if name in row and not _same(again[name], row[name]))
        sentences += [f"{_title(key)}: {name} is {row[name]}, its samples give {again[name]}" for name in wrong]
        short = row["prompts_cut"]
        if short == row["n"]:
            sentences.append(f"{_title(key)}: no prompt held all demonstrations, so shots is mislabelled")
    stored_hash = run.results.get("samples", {}).get("sha256")
    if stored_hash is not None and stored_hash != hashlib.sha256(samples_text(run.samples).encode()).hexdigest():
        sentences.append("samples.jsonl is not the file that results.json was written with: its SHA-256 differs")
    return sentences


def _missing(run: SavedRun) -> list[str]:
    """List queries that occur twice, or not in every setting."""
    sentences = []
    seen: dict[tuple[Any, str], int] = {}
    queries: dict[str, set[str]] = {}
    for sample in run.samples:
        seen[sample.cell, sample.query_id] = seen.get((sample.cell, sample.query_id), 0) + 1
        queries.setdefault(sample.cell.task, set()).add(sample.query_id)
    twice = [key for key, count in seen.items() if count > 1]
    if twice:
        sentences.append(f"{len(twice)} samples occur more than once, the first is {twice[0][1]} of {twice[0][0].task}")
    # A limit applies to the whole task, so every setting has asked the same queries.
    by_cell: dict[Any, set[str]] = {}
    for cell, query_id in seen:
        by_cell.setdefault(cell, set()).add(query_id)
    for cell, asked in by_cell.items():
        lost = sorted(queries[cell.task] - asked)
        if lost:
            sentences.append(
                f"{cell.task}, {cell.shots} shots, seed {cell.seed}: {len(lost)} queries are missing, first {lost[0]}"
            )
    seeds = {cell.seed for cell in by_cell}
    if by_cell and seeds != set(run.results.get("seeds", seeds)):
        sentences.append(f"results.json names the seeds {run.results['seeds']}, the samples have {sorted(seeds)}")
    for name, task in run.results.get("tasks", {}).items():
        if task.get("queries", len(queries.get(name, ()))) != len(queries.get(name, ())):
            sentences.append(
                f"{name}: {task['queries']} queries ran, but the samples have {len(queries.get(name, ()))}"
            )
    return sentences


def _title(key: Sequence[Any]) -> str:
    task, strategy, shots, images = key
    return f"{task}, {strategy}, {shots} shots, images {images}"


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are equal up to rounding of numbers and lists for tuples."""
    if isinstance(a, float | int) and isinstance(b, float | int):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
