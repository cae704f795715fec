"""Resumable checkpoints: what trains, the optimizer, and a few integers, in torch.distributed.checkpoint's format.

A checkpoint is a folder `step-00000100` that is written once and never reused. DCP writes its `.metadata` last, so a
folder without that file is a save that was interrupted: it is never chosen and is removed at the next save. Everything
commits together; nothing lies beside it that could belong to another step. Frozen weights are not in it.
"""

from __future__ import annotations

import json
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

STEP_FOLDER = re.compile(r"step-(\d{8})$")
ONLY_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def step_folders(root: Path, *, complete: bool = True) -> list[tuple[int, Path]]:
    """The checkpoints under `root` by rising step; `complete=False` gives the interrupted ones instead."""
    found = []
    for path in sorted(root.glob("step-*")):
        match = STEP_FOLDER.search(path.name)
        if match and (path / ".metadata").exists() == complete:
            found.append((int(match.group(1)), path))
    return found


def newest(root: Path) -> Path | None:
    """The newest complete checkpoint, if any."""
    folders = step_folders(root)
    return folders[-1][1] if folders else None


def _text(data: dict[str, Any]) -> Tensor:
    """JSON as bytes in a tensor: DCP stores tensors without pickling."""
    return torch.from_numpy(np.frombuffer(json.dumps(data).encode(), dtype=np.uint8).copy())


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


@contextmanager
def _alone() -> Iterator[None]:
    """DCP warns when there is no process group; one process without a group is how most runs here start."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def save(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any],
    *,
    keep_last: int,
) -> Path:
    """Writes checkpoint `step` and removes all but the newest `keep_last`. Called by every process.

    Args:
        root: folder of all checkpoints of the run.
        step: updates made so far.
        model: its trained parameters are saved.
        optimizer: its state is saved by parameter name.
        extra: JSON-able, the same on all processes (the loader's cursor, tokens seen).
        keep_last: how many complete checkpoints stay.

    Raises:
        UserError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    path = root / f"step-{step:08d}"
    try:
        if rank == 0:
            for _, partial in step_folders(root, complete=False):
                shutil.rmtree(partial)
            path.mkdir(parents=True, exist_ok=True)
        _barrier()
        state = {
            "model": get_model_state_dict(model, options=ONLY_TRAINED),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=ONLY_TRAINED),
            "extra": _text(extra),
            f"rng/{rank:05d}": torch.get_rng_state(),
        }
        with _alone():
            dcp.save(state, checkpoint_id=str(path))
    except (OSError, CheckpointException) as error:  # the latter is no Exception, and wraps what a rank raised
        raise UserError(
            f"checkpoint {path} cannot be written ({error}): free space or choose another run.dir"
        ) from error
    _barrier()
    if rank == 0:
        for _, old in step_folders(root)[:-keep_last]:
            shutil.rmtree(old)
    return path


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """All weights, frozen ones too, unsharded and on the CPU of the first process. Called by every process."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restores a checkpoint in place, on any number of processes; returns what was saved as `extra`.

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
    own_rng = f"rng/{rank:05d}"
    if own_rng in sizes:
        state[own_rng] = torch.get_rng_state()
    with _alone():
        dcp.load(state, checkpoint_id=str(path))
    set_model_state_dict(model, state["model"], options=ONLY_TRAINED)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=ONLY_TRAINED)
    if own_rng in state:
        torch.set_rng_state(state[own_rng])
    extra: dict[str, Any] = json.loads(bytes(state["extra"].numpy()).decode())
    return extra
