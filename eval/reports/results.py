"""What a run leaves behind: `results.json`, `samples.jsonl` and the rows they are made of.

A score in `results.json` comes with its 95 % interval, n, its baselines, and everything that could make it misleading:
how often nothing could be parsed, how often a demonstration's answer was copied, how many prompts lost demonstrations
to the context. Files appear under their names only when they are complete.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.metrics.captions import ONE_IMAGE
from eval.metrics.interval import mean_interval
from eval.metrics.selective import selective
from eval.metrics.table import measure
from eval.samples import Cell, Sample
from eval.task import Baselines, Task, content_hash
from flamingo.files import write_atomically

RESULTS_FORMAT = 2
VOLATILE = ("command", "date", "wall_s", "images", "responses", "processes", "device", "threads")
"""Keys of `results.json` in which two runs of the same evaluation may differ."""


def summary(
    samples: Sequence[Sample], baselines: Baselines, metrics: Sequence[str] = (), metric: object = ""
) -> dict[str, Any]:
    """Return a row: the samples of one task, strategy, number of shots and ablation, all seeds.

    `metrics` are the names of those of the whole set, `metric` is that of `score`. An interval that does not exist is
    null, and `notes` say why.
    """
    first = samples[0].cell
    scores = [sample.score for sample in samples]
    clusters, seeds = [sample.cluster for sample in samples], [sample.seed for sample in samples]
    # Two intervals: over any choice of demonstrations (seeds and images), and for those that were drawn (images).
    interval, these = mean_interval(scores, clusters, seeds), mean_interval(scores, clusters)
    demos = sorted((s.cell.seed, s.query_id, s.demo_ids) for s in samples)
    refused: Counter[str] = Counter()
    for sample in samples:
        refused.update(dict(sample.refused))
    measured = measure([*metrics, "rationale"] if any(s.gold_rationale for s in samples) else metrics, samples)
    notes = [f"score: {note}" for note in dict.fromkeys((interval.note, these.note)) if note]
    if metric == "cider" and not any(scores) and len({sample.query_id for sample in samples}) == 1:
        notes.append(f"score: {ONE_IMAGE}")
    notes += [f"{name}: {value['note']}" for name, value in measured.items() if "note" in value]
    return {
        "task": first.task,
        "strategy": first.strategy,
        "shots": first.shots,
        "images": first.images,
        "score": _mean(scores),
        "interval": interval.ends,
        "interval_method": interval.method,
        "interval_these_seeds": these.ends,
        "interval_these_seeds_method": these.method,
        "n": len(samples),
        "n_images": len({sample.cluster for sample in samples}),
        "metrics": measured,
        "notes": notes,
        "chance": baselines.chance,
        "constant": baselines.constant,
        "constant_answer": baselines.constant_answer,
        "score_by_seed": _by(samples, lambda sample: str(sample.cell.seed)),
        "score_by_kind": _by(samples, lambda sample: sample.kind),
        "parse_fail_rate": _mean([sample.parse_failed for sample in samples]),
        "unended_rate": _mean([not sample.ended for sample in samples]),
        "copy_rate": _mean([sample.copied for sample in samples]),
        "copy_last_rate": _mean([sample.copied_last for sample in samples]),
        "demos_shown": {str(k): n for k, n in sorted(Counter(s.shots_kept for s in samples).items())},
        "prompts_cut": sum(sample.demos_dropped > 0 for sample in samples),
        "leaks_refused": sum(sample.excluded for sample in samples),
        "leaks_by_reason": dict(sorted(refused.items())),
        "demo_ids_sha256": content_hash(demos),
        "selective": _selective(samples),
    }


def _selective(samples: Sequence[Sample]) -> dict[str, Any] | None:
    confidences = [sample.confidence for sample in samples if sample.confidence is not None]
    if len(confidences) < len(samples):
        return None
    return asdict(selective([sample.score for sample in samples], confidences))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _by(samples: Sequence[Sample], key: Callable[[Sample], str]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[float]] = {}
    for sample in samples:
        groups.setdefault(key(sample), []).append(sample.score)
    return {name: {"score": _mean(groups[name]), "n": len(groups[name])} for name in sorted(groups)}


def groups_of(samples: Sequence[Sample]) -> dict[tuple[str, str, int, str], list[Sample]]:
    """Return the samples of each row, in the order in which they were run."""
    groups: dict[tuple[str, str, int, str], list[Sample]] = {}
    for sample in samples:
        cell = sample.cell
        groups.setdefault((cell.task, cell.strategy, cell.shots, cell.images), []).append(sample)
    return groups


def rows_of(samples: Sequence[Sample], tasks: Mapping[str, Task]) -> list[dict[str, Any]]:
    """Return all rows, in the order in which they were run."""
    rows = []
    for (name, _, _, _), group in groups_of(samples).items():
        query_ids = list(dict.fromkeys(sample.query_id for sample in group))
        task = tasks[name]
        rows.append(summary(group, task.baselines(query_ids), task.metrics, task.description.get("metric")))
    return rows


def results_of(
    samples: Sequence[Sample], tasks: Mapping[str, Task], grid: Mapping[str, Any], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of `results.json`.

    `grid` is the description of what was run, `provenance` whatever else is known of the run: counts of images and
    responses, the model, the code, the machine.
    """
    rows = rows_of(samples, tasks)
    return {
        "format": RESULTS_FORMAT,
        "rows": rows,
        "tasks": {name: _describe(task, samples) for name, task in tasks.items()},
        "decoding": {"strategy": "greedy", "ranking": "sum of log-probabilities with end of chunk"},
        **grid,
        "samples": {"n": len(samples), "sha256": hashlib.sha256(samples_text(samples).encode()).hexdigest()},
        **provenance,
    }


def _describe(task: Task, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return a task's definition and hash, and the longest prompt as an example of its form."""
    prompts = [sample.prompt for sample in samples if sample.cell.task == task.name]
    example = max(prompts, key=len, default="")
    return {
        "hash": task.hash,
        "definition": task.description,
        "queries": len({sample.query_id for sample in samples if sample.cell.task == task.name}),
        "max_new_tokens": task.max_new_tokens,
        "num_beams": task.num_beams,
        "length_penalty": task.length_penalty,
        "example_prompt": example,
    }


def sample_line(sample: Sample) -> dict[str, Any]:
    """Return a sample as one JSON object; the cell's fields come first."""
    fields = asdict(sample)
    return {**fields.pop("cell"), "prompt": sample.prompt, **fields}


def samples_text(samples: Sequence[Sample]) -> str:
    """Return the content of `samples.jsonl`."""
    return "".join(json.dumps(sample_line(sample), ensure_ascii=False) + "\n" for sample in samples)


NOT_IN_EVERY_RUN = frozenset({"confidence", "rationale", "images_sha256", "gold_rationale"})
"""Fields of a sample that older lines lack; a line without another one is damaged."""


def sample_of(line: Mapping[str, Any]) -> Sample:
    """Return the inverse of `sample_line`. Raises KeyError or TypeError for a line that is not a sample."""
    cell = Cell(line["task"], line["shots"], line["seed"], line["images"], line.get("strategy", "plain"))
    names = Sample.__dataclass_fields__.keys() - {"cell"}
    fields = {name: line[name] for name in names if name in line or name not in NOT_IN_EVERY_RUN}
    for key in ("demo_ids", "golds", "candidates", "log_probs", "images_sha256"):
        fields[key] = tuple(fields.get(key, ()))
    for key in ("turns", "refused", "votes"):
        fields[key] = tuple((first, second) for first, second in fields[key])
    return Sample(cell=cell, **fields)


def write_report(out: Path, results: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """Write `results.json` and `samples.jsonl` into `out`."""
    write_atomically(out / "samples.jsonl", samples_text(samples))
    write_atomically(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def setting(row: Mapping[str, Any]) -> str:
    """Return how a row differs from the plain one, in a few words: strategy and images."""
    return " ".join([row.get("strategy", "plain"), *([row["images"]] if row["images"] != "real" else [])])


def percent(share: float | None) -> str:
    """Return a share as text; a dash if there is none."""
    return "–" if share is None else f"{100 * share:.1f} %"


def interval_text(interval: Sequence[float | None], form: str = ".1f") -> str:
    """Return an interval in per cent as text; a dash if there is none."""
    low, high = interval
    return "–" if low is None or high is None or math.isnan(low) else f"{100 * low:{form}} to {100 * high:{form}}"


def notes_of(results: Mapping[str, Any]) -> list[str]:
    """Return the rows' notes, each once, with the rows that have it."""
    owners: dict[str, list[str]] = {}
    for row in results["rows"]:
        for note in row.get("notes", ()):
            owners.setdefault(note, []).append(f"{row['task']}, {setting(row)}, {row['shots']} shots")
    return [f"{'; '.join(rows[:3])}{' and others' if len(rows) > 3 else ''}: {note}" for note, rows in owners.items()]


def task_width(tasks: Iterable[str]) -> int:
    """Return how wide the first column of a table of tasks is, in letters."""
    return max([18, *(len(task) + 2 for task in tasks)])


def table(results: Mapping[str, Any]) -> str:
    """Return the rows as lines of text for the terminal, and below them what their notes say."""
    width = task_width(row["task"] for row in results["rows"])
    lines = [f"{'task':<{width}}{'setting':<20}{'shots':>5}{'score':>9}   {'95 % interval':<17}{'chance':>7}{'n':>7}"]
    for row in results["rows"]:
        chance = "-" if row["chance"] is None else f"{100 * row['chance']:.1f}"
        lines.append(
            f"{row['task']:<{width}}{setting(row):<20}{row['shots']:>5}{100 * row['score']:>8.1f}%   "
            f"{interval_text(row['interval']):<17}{chance:>7}{row['n']:>7}"
        )
    lines += [*results.get("left_out", ()), *notes_of(results)]
    return "\n".join(lines)
