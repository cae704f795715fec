"""Where the work of a preparation is done: on processes of this machine, on Ray, or in SLURM's job arrays.

An executor is given a function and jobs, which are independent of each other, runs them in any order, those of a
process that died again, and yields each result with its number. What a job writes it writes under names of its own,
whole or not at all, so the order and a second attempt change no byte. Machines other than this one see the folder of
the state (and `--out`, unless that is a store) under the same path.

    processes   a pool of this machine; a worker that is killed ends the run, which the next run continues
    ray         a task for each job; Ray places, retries and scales (RAY_ADDRESS, or a cluster of this machine alone)
    submitit    `--workers` tasks of a job array, each with its share of the jobs; what died is submitted again
"""

from __future__ import annotations

import json
import os
import signal
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, Protocol

from data.prepare.inputs import one_line, required
from data.prepare.units import write_json
from flamingo.errors import UserError

Jobs = Mapping[int, tuple[Any, ...]]
Outcome = dict[str, Any]  # {"result": ...} or {"error": one sentence}; plain JSON
RESUME = "finished units are kept; run the same command again to continue"
TRIES = 4  # of a job whose process died
AHEAD = 2000  # tasks that wait in Ray, so that its autoscaler sees what there is to do
RAY_DEFAULTS = {"num_cpus": 1, "max_retries": TRIES - 1}
SUBMITIT_DEFAULTS = {"name": "prepare", "timeout_min": 24 * 60, "cpus_per_task": 1}


class Executor(Protocol):
    """Runs jobs (see the module)."""

    def __call__(
        self, function: Callable[..., Any], jobs: Jobs, workers: int, options: dict[str, Any], folder: Path
    ) -> Iterator[tuple[int, Any]]:
        """Yield (number, result) of each job as it is finished.

        Args:
            function: of a module, with results that JSON can hold.
            jobs: the function's arguments, by number.
            workers: how many at the same time.
            options: of the engine's own, as given with `--engine-options`.
            folder: for the executor's own files; all machines see it.

        Raises:
            UserError: what a job raised, or that its process died too often.
        """


def engine_options(texts: list[str]) -> dict[str, Any]:
    """Return the options of `--engine-options NAME=VALUE ...`; values are numbers where they look like one.

    Raises UserError for what has no name.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UserError(f"--engine-options {text!r} must be NAME=VALUE, for example slurm_partition=cpu")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def run_jobs(
    function: Callable[..., Any], jobs: Jobs, *, engine: str, workers: int, options: list[str], folder: Path
) -> Iterator[tuple[int, Any]]:
    """Yield (number, result) of each job on the engine of that name. Raises as `Executor`."""
    if engine == "processes" and options:
        raise UserError("--engine-options are for --engine ray or submitit; processes have none")
    if jobs:
        yield from EXECUTORS[engine](function, jobs, workers, engine_options(options), folder)


def on_processes(
    function: Callable[..., Any], jobs: Jobs, workers: int, options: dict[str, Any], folder: Path
) -> Iterator[tuple[int, Any]]:
    """Run jobs on a pool of processes, or in this one when there is nothing to share (an `Executor`)."""
    if workers == 1 or len(jobs) < 2:
        for number, job in jobs.items():
            yield number, function(*job)
        return
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn"), initializer=_die_with_parent)
    try:
        futures: dict[Future[Any], int] = {}
        waiting = iter(jobs.items())
        while True:
            for number, job in islice(waiting, 2 * workers - len(futures)):
                futures[pool.submit(function, *job)] = number
            if not futures:
                return
            finished, _ = wait(futures, return_when=FIRST_COMPLETED)
            for future in finished:
                yield futures.pop(future), future.result()
    except BrokenProcessPool:
        raise UserError(f"a worker was killed (out of memory?); {RESUME}, with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _die_with_parent() -> None:
    """Make a worker end as soon as its parent is gone, so that no orphan writes beside the run that continues."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def on_ray(
    function: Callable[..., Any], jobs: Jobs, workers: int, options: dict[str, Any], folder: Path
) -> Iterator[tuple[int, Any]]:
    """Run each job as a task of Ray, on the cluster that RAY_ADDRESS names or on this machine (an `Executor`)."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of a change to come
    ray = required("ray", "--engine ray", extra="ray")
    try:
        task = ray.remote(**RAY_DEFAULTS | options)(_outcome_in)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--engine-options {options} are refused by Ray ({one_line(error)[:300]})") from None
    _connect(ray, workers)
    pending: dict[Any, int] = {}
    sent: dict[int, Any] = {}  # what all jobs share, such as the command line, travels once
    try:
        waiting = iter(jobs.items())
        while True:
            for number, job in islice(waiting, AHEAD - len(pending)):
                whole = [_once(ray, sent, value) if isinstance(value, Namespace) else value for value in job]
                pending[task.remote(str(Path.cwd()), function, *whole)] = number
            if not pending:
                return
            (done,), _ = ray.wait(list(pending), num_returns=1)
            number = pending.pop(done)
            yield number, _result(ray.get(done))
    except ray.exceptions.RayError as error:
        raise UserError(f"a task of Ray died {TRIES} times or cannot run ({one_line(error)[:300]}); {RESUME}") from None
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)
        ray.shutdown()


def _once(ray: Any, sent: dict[int, Any], value: Any) -> Any:
    """Return Ray's reference to an object, which is sent when it is first asked for."""
    if id(value) not in sent:
        sent[id(value)] = ray.put(value)
    return sent[id(value)]


def _connect(ray: Any, workers: int) -> None:
    """Join the cluster of RAY_ADDRESS; without one start a cluster of this machine with as many slots as workers."""
    import logging

    quiet = {"logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS", "local")
    try:
        if address == "local":
            ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"Ray cannot be reached at RAY_ADDRESS={address} ({one_line(error)[:300]})") from None


def on_submitit(
    function: Callable[..., Any], jobs: Jobs, workers: int, options: dict[str, Any], folder: Path
) -> Iterator[tuple[int, Any]]:
    """Share jobs among the tasks of a SLURM array, and submit again what was left undone (an `Executor`)."""
    submitit = required("submitit", "--engine submitit", extra="slurm")
    options = SUBMITIT_DEFAULTS | options
    cluster = options.pop("cluster", "slurm")
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    for number in jobs:  # of an earlier run: its shards may be gone
        (results / f"{number}.json").unlink(missing_ok=True)
    try:
        executor = submitit.AutoExecutor(folder=folder / "logs", cluster=cluster)
        executor.update_parameters(**options)
    except (RuntimeError, ValueError, NameError, AssertionError, TypeError) as error:
        raise UserError(f"submitit refuses cluster {cluster!r} with {options} ({one_line(error)[:300]})") from None
    left, failures = dict(jobs), 0
    while left:
        shares = [dict(list(left.items())[first::workers]) for first in range(min(workers, len(left)))]
        running = executor.map_array(_share, [function] * len(shares), shares, [str(results)] * len(shares))
        died = ""
        try:
            for task in submitit.helpers.as_completed(running, poll_frequency=1):
                died = _why(task) or died
                for number in [number for number in left if (results / f"{number}.json").exists()]:
                    del left[number]
                    yield number, _result(json.loads((results / f"{number}.json").read_bytes()))
                    failures = 0
        finally:
            for task in running:
                if not task.done():
                    task.cancel()
        failures += 1
        if left and failures == TRIES:
            raise UserError(f"{len(left)} jobs died {TRIES} times ({died}; logs in {folder / 'logs'}); {RESUME}")


def _why(task: Any) -> str:
    """Return why a task of an array has no result, "" when it has one."""
    error = task.exception()
    return "" if error is None else one_line(error)[:300]


def _share(function: Callable[..., Any], jobs: Jobs, folder: str) -> int:
    """Run jobs one after the other and leave the outcome of each in a file; one that is there is not run again."""
    for number, job in jobs.items():
        path = Path(folder) / f"{number}.json"
        if not path.exists():
            write_json(path, _outcome(function, *job))
    return len(jobs)


def _outcome(function: Callable[..., Any], *job: Any) -> Outcome:
    """Run a job. What the user must mend comes back as a sentence: another attempt would end the same way."""
    try:
        return {"result": function(*job)}
    except (UserError, OSError) as error:
        return {"error": str(error)}


def _outcome_in(folder: str, function: Callable[..., Any], *job: Any) -> Outcome:
    """Run a job in the folder that the command was given in, which relative paths begin at."""
    try:
        os.chdir(folder)
    except OSError as error:
        return {"error": f"{os.uname().nodename} does not see the folder {folder} ({error.strerror})"}
    return _outcome(function, *job)


def _result(outcome: Outcome) -> Any:
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["result"]


EXECUTORS: dict[str, Executor] = {"processes": on_processes, "ray": on_ray, "submitit": on_submitit}
