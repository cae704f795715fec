"""Which code, weights, data and machine made a result. Without these a published score cannot be made again."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

PACKAGES = ("torch", "transformers", "open_clip_torch", "xformers", "numpy", "pillow")


def folder_hash(folder: Path) -> str:
    """SHA-256 over names and contents of a model folder's weights and JSON files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".model", ".txt"):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@lru_cache
def code_hash(*paths: str) -> str:
    """SHA-256 over Python files, or folders' own ones, of the checkout: what other code computed is not reused."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    folders = [root / path for path in paths]
    files = [path for path in folders if path.is_file()]
    for file in sorted([*files, *(file for folder in folders for file in folder.glob("*.py"))]):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def provenance(
    model: str, command: Sequence[str], device: str, wall_s: float, model_hash: str | None = None
) -> dict[str, Any]:
    """Everything about a run that its samples do not tell. `wall_s` in seconds; `model_hash` if it is known already."""
    return {
        "model": {"name": model, "sha256": model_hash or folder_hash(Path(model))},
        "command": ["python", "-m", "eval", *command],
        "code": _commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "device": _device(device),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_s": round(wall_s, 2),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _device(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"{device} ({platform.machine()}, {sys.platform})"


def _commit() -> str:
    """The checkout's commit, with "-dirty" where files differ from it; "unknown" outside git."""
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
