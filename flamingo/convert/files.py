"""Reading a released checkpoint: one file of torch or safetensors, or a folder with an index of shards.

Torch files are read with `weights_only`, so a checkpoint cannot run code, and mapped into memory, so a weight
that is left out costs nothing. A folder's index is believed in full: every key it promises must be in the shard that it
names, and no shard may hold another.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flamingo.errors import UserError, first_line
from flamingo.hub import LFS

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
    raise UserError(f"{path} holds no checkpoint: it has none of {', '.join((*INDEXES, *SINGLE))}")


def read_config(path: str | Path) -> dict[str, Any] | None:
    """Return `config.json` of a checkpoint's folder, or of the folder its file is in; None where there is none.

    Raises:
        UserError: it is not a JSON object.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / "config.json"
    return _json(file) if file.is_file() else None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:  # no JSON, or not even UTF-8
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is a JSON {type(content).__name__}, not an object")
    return content


def _read_shards(index: Path) -> dict[str, Tensor]:
    where = _json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{index} has no weight_map of keys to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name:
            raise UserError(f"{index} names {name}, which is not a file beside it")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name}, which {index.name} names, is missing")
        shard = _read_file(index.parent / name)
        promised = {key for key, file in where.items() if file == name}
        if wrong := sorted(promised ^ set(shard)):
            raise UserError(f"{index.parent / name} and {index.name} disagree about {wrong[0]}: download both again")
        tensors |= shard
    return tensors


def _read_file(file: Path) -> dict[str, Tensor]:
    with file.open("rb") as stream:
        if stream.read(len(LFS)) == LFS:
            raise UserError(f"{file} is a pointer of git-lfs and not the weights; fetch them with git lfs pull")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Files from before 2020 are not zip archives and cannot be mapped.
        with warnings.catch_warnings():  # of a pickle's protocol: it is read, or refused below
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        reason = "it is not a torch file"
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it holds {named[1]} beside tensors, which could run code, so it is not loaded"
        raise UserError(f"the checkpoint {file} cannot be read: {reason}") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"the checkpoint {file} cannot be read: {first_line(error)}") from error
    if isinstance(content, dict) and isinstance(content.get("model_state_dict"), dict):
        if other := sorted(map(str, set(content) - {"model_state_dict", *_NOT_WEIGHTS})):
            raise UserError(f"the checkpoint {file} has {other[0]!r} beside model_state_dict; remove it")
        content = content["model_state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"the checkpoint {file} is not a dictionary of tensors")
    return content


def config_from(kind: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Return a transformers config of these values.

    Raises:
        UserError: one of them is not of the type that it should be.
    """
    try:
        return kind(**values)
    except (TypeError, ValueError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"config.json does not make a {getattr(kind, '__name__', kind)}: {reason}") from error
