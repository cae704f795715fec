"""Resumable checkpoints: what trains, the optimizer, and a few integers, in torch.distributed.checkpoint's format.

A checkpoint is a folder `step-00000100` that is written once and never reused. DCP writes its `.metadata` last, so a
folder without that file is a save that was interrupted: it is never chosen and is removed at the next save. Everything
commits together; nothing lies beside it that could belong to another step. Frozen weights are not in it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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

MARKER = ".metadata"
FAILURES = (OSError, RuntimeError, CheckpointException)  # the last is no Exception, and wraps what a rank raised
STEP_FOLDER = re.compile(r"step-(\d{8})$")
ONLY_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def step_folders(root: Path, *, complete: bool = True) -> list[tuple[int, Path]]:
    """The checkpoints under `root` by rising step; `complete=False` gives the interrupted ones instead."""
    found = []
    for path in sorted(root.glob("step-*")):
        match = STEP_FOLDER.search(path.name)
        if match and (path / MARKER).exists() == complete:
            found.append((int(match.group(1)), path))
    return found


def newest(root: Path) -> Path | None:
    """The newest complete checkpoint whose files are as long as its marker says, if any."""
    return next((path for _, path in reversed(step_folders(root)) if not damage(path)), None)


def damage(path: Path) -> str:
    """What a complete checkpoint lacks, or nothing: a machine that lost its power may lose the end of a file."""
    try:
        stored = dcp.FileSystemReader(str(path)).read_metadata().storage_data
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        return f"{path / MARKER} cannot be read ({error})"
    needed: dict[str, int] = {}
    for part in stored.values():
        needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
    for name, size in needed.items():
        file = path / name
        found = file.stat().st_size if file.exists() else 0
        if found < size:
            return f"{file} has {found} of {size} bytes"
    return ""


def clear_partial(root: Path) -> None:
    """Removes what interrupted saves have left."""
    for _, partial in step_folders(root, complete=False):
        shutil.rmtree(partial)


def prune(root: Path, keep_last: int, keep_every: int = 0) -> None:
    """Removes all complete checkpoints but the newest `keep_last` and those of steps divisible by `keep_every`."""
    for step, old in step_folders(root)[:-keep_last]:
        if not keep_every or step % keep_every:
            # Without its marker first: a removal that is interrupted leaves nothing that looks whole.
            (old / MARKER).unlink()
            shutil.rmtree(old)


def _text(data: Any) -> Tensor:
    """JSON as bytes in a tensor: DCP stores tensors without pickling."""
    return torch.from_numpy(np.frombuffer(json.dumps(data).encode(), dtype=np.uint8).copy())


def _read(text: Tensor) -> Any:
    return json.loads(bytes(text.numpy()).decode())


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def ignore_alone() -> None:
    """DCP warns when there is no process group; one process without a group is how most runs here start."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@contextmanager
def _alone() -> Iterator[None]:
    with warnings.catch_warnings():
        ignore_alone()
        yield


def random_state() -> dict[str, Any]:
    """Python's, numpy's and this process's GPU's generators; torch's own on the CPU is saved beside it."""
    numpys: Any = np.random.get_state()  # noqa: NPY002 - the global generator, which a library may draw from
    kind, keys, *rest = numpys
    found: dict[str, Any] = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state().tolist()
    return found


def restore_random(found: dict[str, Any]) -> None:
    """What `random_state` has told."""
    version, keys, gauss = found["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, *rest = found["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), *rest))  # noqa: NPY002
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(found["cuda"], dtype=torch.uint8))


def trained_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any], averages: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """All that a checkpoint holds, by its keys; what belongs to a process carries its rank. Called by every process."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return {
        "model": get_model_state_dict(model, options=ONLY_TRAINED),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=ONLY_TRAINED),
        "extra": _text(extra),
        f"rng/{rank:05d}": torch.get_rng_state(),
        f"random/{rank:05d}": _text(random_state()),
        **({"ema": averages} if averages else {}),
    }


def why(error: BaseException) -> str:
    """The first reason in one line: DCP wraps what the processes raised, with their tracebacks, in one exception."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"{why(cause)}, process {rank}"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def save(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any],
    *,
    keep_last: int,
    averages: dict[str, Tensor] | None = None,
) -> Path:
    """Writes checkpoint `step` and removes all but the newest `keep_last`. Called by every process.

    Args:
        root: folder of all checkpoints of the run.
        step: updates made so far.
        model: its trained parameters are saved.
        optimizer: its state is saved by parameter name.
        extra: JSON-able, the same on all processes (the loader's cursor, tokens seen).
        keep_last: how many complete checkpoints stay.
        averages: means of the trained weights, if they are kept.

    Raises:
        UserError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    path = open_folder(root, step)
    try:
        with _alone():
            dcp.save(trained_state(model, optimizer, extra, averages), checkpoint_id=str(path))
    except FAILURES as error:
        raise unwritable(path, error) from error
    _barrier()
    if not dist.is_initialized() or dist.get_rank() == 0:
        prune(root, keep_last)
    return path


def open_folder(root: Path, step: int) -> Path:
    """A new, empty folder for checkpoint `step`, interrupted saves being removed. Called by every process.

    Raises:
        UserError: on every process, when the first one cannot make it.
    """
    path = root / f"step-{step:08d}"
    problem: list[str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            clear_partial(root)
            if path.is_dir():  # whole once and damaged since: files of two saves must not mix
                (path / MARKER).unlink()
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
    """The error for a checkpoint that could not be written; what there is of it is removed, which also frees space."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
    text = reason if isinstance(reason, str) else why(reason)
    return UserError(f"checkpoint {path} cannot be written ({text}): free space or choose another run.dir")


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """All weights, frozen ones too, unsharded and on the CPU of the first process. Called by every process."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, averages: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """Restores a checkpoint in place, on any number of processes; returns what was saved as `extra`.

    A process that did not exist when it was saved draws random numbers of its own from then on: with dropout such a run
    is another one, without it is the same.

    Raises:
        UserError: the checkpoint does not hold exactly the parameters that train now.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    reader = dcp.FileSystemReader(str(path))
    sizes = reader.read_metadata().state_dict_metadata
    weights = get_model_state_dict(model, options=ONLY_TRAINED)
    saved = {key.removeprefix("model.") for key in sizes if key.startswith("model.")}
    if saved != set(weights):
        odd = sorted(saved ^ set(weights))
        raise UserError(
            f"checkpoint {path} and the model train different parameters ({len(odd)} differ, the first is {odd[0]}): "
            "use the config of that run, or another run.dir"
        )
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
    with _alone():
        dcp.load(state, checkpoint_id=str(path))
    set_model_state_dict(model, state["model"], options=ONLY_TRAINED)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=ONLY_TRAINED)
    extra: dict[str, Any] = _read(state["extra"])
    if own in state:
        torch.set_rng_state(state[own])
    else:
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{path.name} {rank}".encode()).digest()[:7], "big"))
    if own_random in state:
        restore_random(_read(state[own_random]))
    return extra
