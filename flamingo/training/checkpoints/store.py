"""Resumable checkpoints: what trains, the optimizer, and a few integers, in torch.distributed.checkpoint's format.

A checkpoint is a folder `step-00000100` that is written once and never reused. DCP writes its `.metadata` last, so a
folder without that file is a save that was interrupted: it is never chosen and is removed at the next save. Everything
commits together; nothing lies beside it that could belong to another step. Frozen weights are not in it. Whether its
files are still what was written is the business of `integrity.py`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from flamingo.errors import UserError
from flamingo.training.checkpoints import integrity
from flamingo.training.checkpoints.ema import Ema
from flamingo.training.checkpoints.integrity import MARKER
from flamingo.training.config import RunConfig
from flamingo.training.distributed.fsdp import Processes
from flamingo.training.distributed.interruptions import StopSignals

FAILURES = (OSError, RuntimeError, CheckpointException)  # the last is not an Exception, and wraps what a rank raised
STEP_FOLDER = re.compile(r"step-(\d{8})$")
ONLY_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def step_folders(root: Path, *, complete: bool = True) -> list[tuple[int, Path]]:
    """Return the checkpoints under `root` by rising step; `complete=False` gives the interrupted ones instead.

    Raises:
        UserError: the folder cannot be read; none of its checkpoints counts as missing.
    """
    try:
        # Not glob, which takes a folder that cannot be read for an empty one.
        paths = integrity.read_patiently(lambda: sorted(root.iterdir()), root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    folders = []
    for path in paths:
        match = STEP_FOLDER.match(path.name)
        if match and _is_marked(path) == complete:
            folders.append((int(match.group(1)), path))
    return folders


def _is_marked(path: Path) -> bool:
    try:
        integrity.read_patiently((path / MARKER).stat, path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


damage = integrity.damage


@dataclass(frozen=True)
class Choice:
    """What a run folder offers to go on from."""

    path: Path | None
    passed_over: dict[Path, str]
    """Newer checkpoints than `path` that were complete once, each to what is wrong with it."""


def choose(root: Path, processes: Processes | None = None) -> Choice:
    """Return the newest checkpoint that is what was written, and what is wrong with newer ones. By every process.

    Raises:
        UserError: files cannot be read for a reason that may pass.
    """
    rank, size = (processes.rank, processes.size) if processes else (0, 1)
    passed_over: dict[Path, str] = {}
    found = [step_folders(root)] if rank == 0 else [[]]
    if size > 1:  # a shared file system may show the others something else
        dist.broadcast_object_list(found, src=0)
    for _, path in reversed(found[0]):
        own = damage(path, rank=rank, size=size)
        problems = [own] * size
        if size > 1:
            dist.all_gather_object(problems, own)
        problem = next(filter(None, problems), "")
        if not problem:
            return Choice(path, passed_over | _lost(root, path))
        passed_over[path] = problem
    return Choice(None, passed_over | _lost(root, None))


def _lost(root: Path, chosen: Path | None) -> dict[Path, str]:
    """Return checkpoints newer than the chosen one that were complete and have lost their marker, or are gone."""
    record = integrity.record_of(root)
    try:
        name = json.loads(integrity.read_patiently(record.read_bytes, record))["newest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        return {}
    newest_path = root / str(name)
    if not STEP_FOLDER.match(newest_path.name) or (chosen is not None and newest_path.name <= chosen.name):
        return {}
    if not newest_path.is_dir():
        return {newest_path: "it was complete and is gone"}
    if _is_marked(newest_path):
        return {}
    return {newest_path: f"it was complete and has no {MARKER} (was it copied without hidden files?)"}


def newest(root: Path) -> Path | None:
    """Return the newest complete checkpoint whose files are what was written, if any. By one process alone."""
    return choose(root).path


def clear_partial(root: Path) -> None:
    """Remove what interrupted saves have left."""
    for _, partial in step_folders(root, complete=False):
        shutil.rmtree(partial)


def prune(root: Path, keep_last: int, keep_every: int = 0) -> None:
    """Remove all whole checkpoints but the newest `keep_last` and those of steps divisible by `keep_every`.

    One that has lost bytes neither counts nor is removed. Contents are not read again: a start moves what is damaged
    out of the way (`flamingo.training.run_folder`), and what was written since was written by this process.
    """
    whole = [(step, path) for step, path in step_folders(root) if not damage(path, contents=False)]
    for step, old in whole[:-keep_last]:
        if not keep_every or step % keep_every:
            # The marker goes first: a removal that is interrupted leaves nothing that looks complete.
            (old / MARKER).unlink()
            shutil.rmtree(old)


def _text(data: Any) -> Tensor:
    """Return JSON as bytes in a tensor: DCP stores tensors without pickling."""
    return torch.from_numpy(np.frombuffer(json.dumps(data).encode(), dtype=np.uint8).copy())


def _read(text: Tensor) -> Any:
    return json.loads(bytes(text.numpy()).decode())


def ignore_group_warning() -> None:
    """Silence DCP about the missing process group: most runs here start as one process without a group."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@contextmanager
def _without_group_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        ignore_group_warning()
        yield


def random_state() -> dict[str, Any]:
    """Return the state of Python's, numpy's and this process's GPU's generators; torch's CPU state is saved apart."""
    numpys: Any = np.random.get_state()  # noqa: NPY002 - the global generator, which a library may draw from
    kind, keys, *rest = numpys
    state: dict[str, Any] = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return state


def restore_random(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), *rest))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))


def trained_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any],
    averages: dict[str, Tensor] | None = None,
    own: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a checkpoint's content by its keys; what belongs to a process carries its rank. By every process."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return {
        "model": get_model_state_dict(model, options=ONLY_TRAINED),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=ONLY_TRAINED),
        "extra": _text(extra),
        f"rng/{rank:05d}": torch.get_rng_state(),
        f"random/{rank:05d}": _text(random_state()),
        f"own/{rank:05d}": _text(own or {}),
        **({"ema": averages} if averages else {}),
    }


def why(error: BaseException) -> str:
    """Return the first reason in one line: DCP wraps what all processes raised, with tracebacks, in one exception."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"{why(cause)}, process {rank}"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def open_folder(root: Path, step: int) -> Path:
    """Make a new, empty folder for checkpoint `step` and remove interrupted saves. Called by every process.

    Raises:
        UserError: on every process, when the first one cannot make it.
    """
    path = root / f"step-{step:08d}"
    problem: list[str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            clear_partial(root)
            if path.is_dir():  # whole once and damaged since: files of two saves must not mix
                (path / MARKER).unlink(missing_ok=True)
                shutil.rmtree(path)
            path.mkdir(parents=True)
        except OSError as error:
            problem = [why(error)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise unwritable(path, problem[0])
    return path


def unwritable(path: Path, reason: BaseException | str) -> UserError:
    """Return the error for a checkpoint that could not be written, and remove what there is of it to free space."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
    text = reason if isinstance(reason, str) else why(reason)
    return UserError(f"checkpoint {path} cannot be written ({text}): free space or choose another run.dir")


def full_weights(model: nn.Module) -> dict[str, Any]:
    """Return all weights, frozen ones too, unsharded and on the CPU of the first process. Called by every process."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _check_parameters(path: Path, sizes: dict[str, Any], weights: dict[str, Any]) -> None:
    """Raise UserError where a checkpoint does not hold exactly these parameters."""
    saved = {key.removeprefix("model.") for key in sizes if key.startswith("model.")}
    if saved != set(weights):
        odd = sorted(saved ^ set(weights))
        raise UserError(
            f"checkpoint {path} and the model train different parameters ({len(odd)} differ, the first is {odd[0]}): "
            "use the config of that run, or another run.dir"
        )
    # A missing size is that of something else than a tensor, which weights are not.
    shapes = {key: getattr(value, "shape", None) for key, value in weights.items()}
    others = [key for key, shape in shapes.items() if getattr(sizes[f"model.{key}"], "size", None) != shape]
    if others:
        raise UserError(
            f"checkpoint {path} and the model have {others[0]} in different shapes "
            f"({len(others)} differ): use the backbones and the config of that run, or another run.dir"
        )


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, averages: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """Restore a checkpoint in place, on any number of processes; return what was saved as `extra`.

    A process that did not exist when it was saved draws random numbers of its own from then on: with dropout such a run
    is another one, without it is the same. The result's `own` lists what processes saved as theirs: one entry for each
    where there are as many as now, otherwise some processes take over more than one, or none.

    Raises:
        UserError: the checkpoint does not hold exactly the parameters that train now.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    reader = integrity.Reader(str(path))
    sizes = reader.read_metadata().state_dict_metadata
    if "extra" not in sizes:
        raise UserError(f"checkpoint {path} was not written by a run of this program: use another run.dir")
    weights = get_model_state_dict(model, options=ONLY_TRAINED)
    _check_parameters(path, sizes, weights)
    state: dict[str, Any] = {
        "model": weights,
        "optimizer": get_optimizer_state_dict(model, optimizer, options=ONLY_TRAINED),
        "extra": torch.empty(tuple(sizes["extra"].size), dtype=torch.uint8),  # type: ignore[union-attr]
    }
    if averages:
        state["ema"] = averages
    own, own_random = f"rng/{rank:05d}", f"random/{rank:05d}"
    if own in sizes:
        state[own] = torch.get_rng_state()
    if own_random in sizes:
        state[own_random] = torch.empty(tuple(sizes[own_random].size), dtype=torch.uint8)  # type: ignore[union-attr]
    size = dist.get_world_size() if dist.is_initialized() else 1
    mine = sorted(key for key in sizes if key.startswith("own/"))[rank::size]
    state |= {key: torch.empty(tuple(sizes[key].size), dtype=torch.uint8) for key in mine}  # type: ignore[union-attr]
    with _without_group_warning():
        try:
            dcp.load(state, storage_reader=reader)
        except FAILURES as error:
            raise UserError(
                f"checkpoint {path} cannot be read ({why(error)}): repair the storage and give the same command again"
            ) from error
    set_model_state_dict(model, state["model"], options=ONLY_TRAINED)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=ONLY_TRAINED)
    extra: dict[str, Any] = _read(state["extra"])
    if own in state:
        torch.set_rng_state(state[own])
    else:
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{path.name} {rank}".encode()).digest()[:7], "big"))
    if own_random in state:
        restore_random(_read(state[own_random]))
    owned = [found for key in mine if (found := _read(state[key]))]
    return {**extra, "own": owned} if owned else extra


class Checkpoints:
    """When the checkpoints of a run are written, in the background, and which of them stay.

    Training waits only for the copy of what trains to the CPU's memory; a thread writes it and talks to the other
    processes through a group of its own. One save is in flight at most. A save that fails is reported to all processes
    with the next update's sum, so that all of them stop at the same update.
    """

    def __init__(
        self,
        root: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        processes: Processes,
        options: RunConfig,
        averages: Ema | None = None,
    ) -> None:
        """Called by every process at the same point, since it makes a process group.

        Args:
            root: folder of all checkpoints.
            model: its trained parameters are saved.
            optimizer: saved beside them.
            processes: of the run.
            options: how often, and which stay.
            averages: means of the weights, if they are kept.
        """
        self.signals = StopSignals(options.checkpoint.grace_seconds)
        self._root, self._model, self._optimizer, self._averages = root, model, optimizer, averages
        self._processes, self._options = processes, options
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._writing: tuple[Path, Future[Any]] | None = None
        self._background = options.checkpoint.background
        self._saved_step, self._saved_at = -1, time.monotonic()
        ignore_group_warning()

    def votes(self) -> list[float]:
        """Return this process's part of the update's sum: asked to stop, time for a checkpoint, the last one failed."""
        minutes = self._options.checkpoint.minutes
        late = minutes and time.monotonic() - self._saved_at >= 60 * minutes
        failed = self._writing is not None and self._writing[1].done() and self._writing[1].exception() is not None
        return [float(self.signals.signum > 0), float(bool(late) and self._processes.is_main), float(failed)]

    def due(self, step: int, votes: list[float]) -> bool:
        """Return whether a checkpoint is written after update `step`, from the summed votes; the same on every process.

        Raises:
            UserError: the save in flight has failed somewhere.
        """
        if votes[2]:
            self.finish()
        return step % self._options.checkpoint_every == 0 or votes[0] > 0 or votes[1] > 0

    def save(self, step: int, extra: dict[str, Any], own: dict[str, Any] | None = None, *, wait: bool) -> Path:
        """Write checkpoint `step` unless it is written; `wait` until it is complete.

        Args:
            step: updates that were made.
            extra: plain values, the same on every process.
            own: plain values of this process.
            wait: return when it is complete.

        Raises:
            UserError: it cannot be written, or the one before could not.
        """
        self.finish()
        path = self._root / f"step-{step:08d}"
        if step != self._saved_step:
            open_folder(self._root, step)
            means = self._averages.means if self._averages else None
            content = trained_state(self._model, self._optimizer, extra, means, own)
            if wait or not self._in_background(path, content):
                try:
                    dcp.save(content, storage_writer=integrity.Writer(path), process_group=self._group)
                except FAILURES as error:
                    raise unwritable(path, error) from error
                self._prune()
            self._saved_step, self._saved_at = step, time.monotonic()
        return path

    def _in_background(self, path: Path, content: dict[str, Any]) -> bool:
        if self._background:
            try:
                writer = integrity.Writer(path)
                future = dcp.async_save(content, storage_writer=writer, process_group=self._group)
            except (AssertionError, NotImplementedError, TypeError, ValueError) as error:  # the same on all processes
                self._background = False
                print(f"checkpoints are written in the foreground ({why(error)})", file=sys.stderr, flush=True)
            else:
                assert isinstance(future, Future)
                self._writing = path, future
        return self._background

    def finish(self) -> None:
        """Wait for the save in flight, if any. Called by every process.

        Raises:
            UserError: it failed.
        """
        if self._writing is None:
            return
        (path, future), self._writing = self._writing, None
        try:
            future.result()
        except FAILURES as error:
            raise unwritable(path, error) from error
        self._prune()

    def _prune(self) -> None:
        if self._processes.is_main:
            # Too many checkpoints do no harm until the disk is full, and that is reported.
            with suppress(OSError, UserError):
                prune(self._root, self._options.keep_last, self._options.checkpoint.keep_every)

    def close(self) -> None:
        """Wait for the thread, whatever its outcome, and restore the signal handlers."""
        self.signals.close()
        if self._writing is not None:
            with suppress(TimeoutError):
                self._writing[1].exception(timeout=30)  # another process may be gone
