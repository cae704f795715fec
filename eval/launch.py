"""One evaluation from its checked settings to its files: what `python -m eval` calls once the settings are right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging

from eval.config import EvalConfig
from eval.inference.engine import Engine, Ranks
from eval.inference.feature_cache import FeatureCache, ImageStore
from eval.inference.model import check_model_folder, load_responder
from eval.inference.provenance import code_hash, provenance
from eval.inference.response_log import ResponseLog
from eval.prompting.strategies import requests_of
from eval.reports.gallery import choose_for_strip, gallery_html, strip_png
from eval.reports.results import results_of, write_report
from eval.runner import Grid, run
from eval.samples import Cell, Sample
from eval.spec import TaskSpec
from eval.task import content_hash
from eval.tasks.build import build_task, check_shots
from flamingo.errors import UserError
from flamingo.files import folder_hash, write_atomically
from flamingo.folder_lock import lock_folder


def evaluate(config: EvalConfig, command: Sequence[str]) -> dict[str, Any]:
    """Run what the config asks for and write every output. Returns the content of results.json.

    Under torchrun every process does its share, and only the first one writes; the others return the same.
    """
    start = time.perf_counter()
    check_model_folder("model", config.model)
    check_out(Path(config.out))
    tasks = {name: build_task(name, _spec(config, spec)) for name, spec in config.task.items()}
    check_shots(tasks, config.shots)
    with Ranks.from_environment() as ranks, _claimed(config.out, ranks):
        # Every process plans the same batches, so different data would lose queries or ask them twice.
        for name, task in tasks.items():
            ranks.agree(f"task {name}", task.hash)
        axes = (config.shots, config.seed, config.images)
        grid = Grid(*axes, config.limit, config.batch_size, config.strategy, config.settings)
        each = {cell: requests_of(cell.strategy, config.settings) for cell in grid.cells(tasks)}
        total = {cell: count * len(grid.query_ids(tasks[cell.task])) for cell, count in each.items()}
        engine, model_key = build_engine(config, ranks)
        with progress_bar(total, config.progress and ranks.first) as on_batch:
            samples, cache = run(tasks, grid, engine.responder, on_batch, engine)
        shares = ranks.gathered((cache.encoded, engine.asked, engine.from_log))
        facts = provenance(config.model, command, config.device_name(), time.perf_counter() - start, model_key)
        facts |= {
            "images": cache.counts() | {"encoded": sum(share[0] for share in shares)},
            "responses": {"asked": sum(share[1] for share in shares), "from_log": shares[0][2]},
            "processes": ranks.world,
        }
        results = results_of(samples, tasks, grid.description(), facts)
        if ranks.first:
            write_outputs(config, results, samples, cache)
        ranks.barrier()
    return results


@contextmanager
def _claimed(out: str, ranks: Ranks) -> Iterator[None]:
    """Hold the output folder, on the first process."""
    with ExitStack() as held:
        if ranks.first:
            remedy = "wait for its end, stop it, or give another out="
            try:
                held.enter_context(lock_folder(Path(out), "an evaluation", remedy))
            except OSError as error:
                raise UserError(f"out={out} cannot be written ({error}); free space, or give another folder") from error
        yield


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


def check_out(out: Path) -> None:
    """Raise UserError unless files can be written into `out`, before anything takes long; nothing is left there."""
    try:
        with TemporaryFile(dir=next(folder for folder in (out, *out.absolute().parents) if folder.exists())):
            pass
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error}): give another folder") from None


def write_outputs(config: EvalConfig, results: dict[str, Any], samples: list[Sample], cache: FeatureCache) -> None:
    """Write every file except the log of responses, which exists already.

    Raises:
        UserError: a file cannot be written; the answers stay in the log.
    """
    from eval.reports.plots import curve_png  # matplotlib takes a second to import

    out = Path(config.out)
    try:
        write_report(out, results, samples)
        write_atomically(out / "curve.png", curve_png({"": results}))
        if config.gallery:
            write_atomically(out / "gallery.html", gallery_html(results, samples, cache.images, config.gallery))
            write_atomically(out / "gallery.png", strip_png(choose_for_strip(samples), cache.images))
    except OSError as error:
        raise UserError(
            f"the results cannot be written to out={out} ({error}): free space and give the same command again, which "
            "takes the answers from responses.jsonl"
        ) from None


@contextmanager
def progress_bar(total: dict[Cell, int], shown: bool) -> Iterator[Callable[[Cell, int], None]]:
    """Show a bar on stderr with the current cell and the time left; give the runner's callback."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        bar = progress.add_task("evaluating", total=sum(total.values()))

        def advance(cell: Cell, done: int) -> None:
            what = f"{cell.task}, {cell.strategy}, {cell.shots} shots, {cell.images}"
            progress.update(bar, advance=done, description=what)

        yield advance
