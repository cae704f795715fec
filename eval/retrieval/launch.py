"""`python -m eval` for tasks that compare vectors: from checked settings to the files that every evaluation writes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.config import EvalConfig
from eval.inference.engine import Ranks
from eval.inference.provenance import provenance
from eval.outputs import check_out, claimed, progress_bar, write_outputs
from eval.reports.results import results_of
from eval.retrieval.encoder import load_encoder
from eval.retrieval.tasks import build_matching_task
from eval.runner import Grid
from eval.samples import Cell, Sample
from flamingo.configs.compose import CONFIGS
from flamingo.errors import UserError

USED = ("model", "out", "data", "task", "limit", "batch_size", "device", "gallery", "progress")
"""Settings of hydra/eval.yaml that mean something here; the others are about prompts."""


def evaluate_encoder(config: EvalConfig, command: Sequence[str]) -> dict[str, Any]:
    """Run tasks of the kinds zero_shot and retrieval and write every output. Returns the content of results.json."""
    start = time.perf_counter()
    _refuse_unused(command)
    check_out(Path(config.out))
    tasks = {name: build_matching_task(name, spec) for name, spec in config.task.items()}
    encoder = load_encoder(config.model, config.device_name(), config.batch_size)
    samples: list[Sample] = []
    total = {Cell(name, 0, 0, "real"): len(task.query_ids()) for name, task in tasks.items()}
    with claimed(config.out, Ranks()), progress_bar(total, config.progress) as on_batch:
        for task in tasks.values():
            for sample in task.samples(encoder, config.limit):
                samples.append(sample)
                on_batch(sample.cell, 1)
        queries = (tasks[sample.cell.task].episode(sample.query_id, 0, 0).query for sample in samples)
        shown = {query.image.sha256: query.image for query in queries if query.image is not None}
        wall_s = time.perf_counter() - start
        facts = provenance(config.model, command, config.device_name(), wall_s, encoder.key) | {
            "images": {"shown": len(shown), "distinct": len(shown), "encoded": len(shown)},
            "responses": {"asked": len(samples), "from_log": 0},
            "processes": 1,
            "texts_cut": encoder.texts_cut,
        }
        grid = Grid([0], [0], ["real"], config.limit, config.batch_size)
        results = results_of(samples, tasks, grid.description(), facts)
        write_outputs(config, results, samples, shown)
    if encoder.texts_cut:
        print(f"{encoder.texts_cut} texts are longer than the text encoder reads and were cut", file=sys.stderr)
    return results


def _refuse_unused(command: Sequence[str]) -> None:
    """Refuse settings that would change nothing, and more processes than one."""
    import yaml

    known = yaml.safe_load((CONFIGS / "eval.yaml").read_text())
    given = [argument.partition("=")[0].lstrip("+~") for argument in command]
    if unused := [key for key in given if key in known and key not in USED]:
        raise UserError(
            f"{unused[0]} has no effect on tasks of the kinds zero_shot and retrieval, which show no prompt: remove it"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("tasks of the kinds zero_shot and retrieval run in one process: start it without torchrun")
