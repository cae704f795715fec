"""Reading a released checkpoint: one file of torch or safetensors, or a folder with an index of shards.

Notable: torch files are read with `weights_only`, so a checkpoint cannot run code, and mapped into memory, so a weight
that is left out costs nothing. A folder's index is believed in full: every key it promises must be in the shard that it
names, and no shard may hold another.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flamingo.errors import UserError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin", "checkpoint.pt")
_NOT_WEIGHTS = ("epoch", "optimizer_state_dict", "lr_scheduler_state_dict", "global_step", "args", "config")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a file, or of a folder with `model.safetensors`, `pytorch_model.bin`, `checkpoint.pt` or
    the index of shards of one of the first two.

    Raises:
        UserError: nothing there, unreadable, not tensors, or an index and shards that contradict each other.
    """
    path = Path(path)
    if path.is_file():
        return _read_file(path)
    if not path.is_dir():
        raise UserError(f"the checkpoint {path} does not exist")
    for name in INDEXES:
        if (path / name).is_file():
            return _read_shards(path / name)
    for name in SINGLE:
        if (path / name).is_file():
            return _read_file(path / name)
    raise UserError(f"{path} holds no checkpoint: none of {', '.join((*INDEXES, *SINGLE))} is there")


def read_config(path: str | Path) -> dict[str, Any] | None:
    """Return `config.json` of a checkpoint's folder, or of the folder its file is in; None where there is none."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    where: dict[str, str] = json.loads(index.read_text())["weight_map"]
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name}, which {index.name} names, is missing")
        shard = _read_file(index.parent / name)
        promised = {key for key, file in where.items() if file == name}
        if wrong := sorted(promised ^ set(shard)):
            raise UserError(f"{index.parent / name} and {index.name} disagree about {wrong[0]}")
        tensors |= shard
    return tensors


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"the checkpoint {file} cannot be read: {str(error).splitlines()[0]}") from error
    if isinstance(found, dict) and isinstance(found.get("model_state_dict"), dict):
        if other := sorted(set(found) - {"model_state_dict", *_NOT_WEIGHTS}):
            raise UserError(f"the checkpoint {file} has {other[0]!r} beside model_state_dict, which is not known")
        found = found["model_state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"the checkpoint {file} is not a dictionary of tensors")
    return found
