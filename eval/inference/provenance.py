"""Which code, weights, data and machine made a result. Without these a published score cannot be reproduced."""

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

from flamingo.files import folder_hash

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "open_clip_torch", "xformers", "numpy", "pillow")


@lru_cache
def code_hash(*paths: str) -> str:
    """Return the SHA-256 over Python files, or those below folders, of the checkout.

    It is part of the keys of features and responses: what other code computed is not reused. The trainer is left out,
    because nothing that it contains runs here.
    """
    digest = hashlib.sha256()
    for path in paths:
        target = ROOT / path
        for file in sorted(target.rglob("*.py")) if target.is_dir() else [target]:
            name = file.relative_to(ROOT).as_posix()
            if not name.startswith("flamingo/training/"):
                digest.update(name.encode() + b"\0")
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def provenance(
    model: str, command: Sequence[str], device: str, wall_s: float, model_hash: str | None = None
) -> dict[str, Any]:
    """Return everything about a run that its samples do not say. `wall_s` in seconds; `model_hash` if already known."""
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
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _device(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"{device} ({platform.machine()}, {sys.platform})"


def _commit() -> str:
    """Return the checkout's commit, with "-dirty" where files differ from it; "unknown" outside git."""
    try:
        process = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return process.stdout.strip() or "unknown"
