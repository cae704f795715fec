"""One evaluation from its checked settings to its files: what `python -m eval` calls once the settings are right."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from eval.config import EvalConfig
from eval.inference.engine import Engine, Ranks
from eval.inference.feature_cache import FeatureCache, ImageStore
from eval.inference.model import check_model_folder, load_responder
from eval.inference.provenance import code_hash, provenance
from eval.inference.response_log import ResponseLog
from eval.outputs import check_out, claimed, progress_bar, write_outputs
from eval.prompting.strategies import requests_of
from eval.reports.results import results_of
from eval.retrieval.index_embedder import IndexEmbedder
from eval.runner import Grid, run
from eval.spec import TaskSpec
from eval.task import content_hash
from eval.tasks.build import build_task, check_shots
from flamingo.files import folder_hash


def evaluate(config: EvalConfig, command: Sequence[str]) -> dict[str, Any]:
    """Run what the config asks for and write every output. Returns the content of results.json.

    Under torchrun every process does its share, and only the first one writes; the others return the same.
    """
    start = time.perf_counter()
    check_model_folder("model", config.model)
    check_out(Path(config.out))
    tasks = {name: build_task(name, _spec(config, spec)) for name, spec in config.task.items()}
    check_shots(tasks, config.shots)
    with Ranks.from_environment() as ranks, claimed(config.out, ranks):
        # Every process plans the same batches, so different data would lose queries or ask them twice.
        for name, task in tasks.items():
            ranks.agree(f"task {name}", task.hash)
        axes = (config.shots, config.seed, config.images)
        grid = Grid(*axes, config.limit, config.batch_size, config.strategy, config.settings)
        each = {cell: requests_of(cell.strategy, config.settings) for cell in grid.cells(tasks)}
        total = {cell: count * len(grid.query_ids(tasks[cell.task])) for cell, count in each.items()}
        engine, model_key = build_engine(config, ranks)
        index = None if config.index is None else IndexEmbedder(config.index, engine, config.device_name())
        with progress_bar(total, config.progress and ranks.first) as on_batch:
            samples, cache = run(tasks, grid, engine.responder, on_batch, engine, index)
        shares = ranks.gathered((cache.encoded, engine.asked, engine.from_log))
        facts = provenance(config.model, command, config.device_name(), time.perf_counter() - start, model_key)
        facts |= {
            "images": cache.counts() | {"encoded": sum(share[0] for share in shares)},
            "responses": {"asked": sum(share[1] for share in shares), "from_log": shares[0][2]},
            "processes": ranks.world,
        }
        facts |= {} if index is None else {"index": index.description}
        results = results_of(samples, tasks, grid.description(), facts)
        if ranks.first:
            write_outputs(config, results, samples, cache.images)
        ranks.barrier()
    return results


def _spec(config: EvalConfig, spec: TaskSpec) -> TaskSpec:
    """Return a task's own settings under those of the run."""
    return spec if config.demos is None or spec.kind == "binding" else replace(spec, demos=config.demos)


def build_engine(config: EvalConfig, ranks: Ranks) -> tuple[Engine, str]:
    """Return the model with its caches and its log, and the hash of its folder."""
    logging.disable_progress_bar()  # only the evaluation has a progress bar
    responder = load_responder("model", config.model, config.device_name(), config.dtype)
    model_hash = folder_hash(Path(config.model))
    ranks.agree(f"model {config.model}", model_hash)
    limit = int(config.cache_gb * 1e9)
    store = None if config.cache is None else ImageStore(Path(config.cache), responder.image_key, limit)
    code = code_hash("flamingo", "eval/inference/model.py")
    key = content_hash(model_hash, responder.image_key, config.dtype, code)
    log = ResponseLog(Path(config.out), ranks.rank)
    ranks.barrier()  # no process writes before all have read
    cache = FeatureCache(responder, store=store)
    return Engine(responder, cache, config.batch_size, log=log, ranks=ranks, model_key=key), model_hash
