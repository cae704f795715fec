"""What processes must have in common before they train: one exchange at the start, one sentence about who differs."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from flamingo.errors import UserError
from flamingo.training.distributed.fsdp import Processes

ROOT = Path(__file__).resolve().parents[3]
CODE = ("flamingo", "data", "train.py")


def require_same(processes: Processes, facts: Mapping[str, Any]) -> None:
    """Compare facts (what they are about, to a plain value) between all processes. Called by every one of them.

    Raises:
        UserError: on every process, naming the first one that differs and in what.
    """
    if processes.size == 1:
        return
    own = {name: _digest(value) for name, value in facts.items()}
    processes.wait_long()  # one may have had far more to read than another
    everyone: list[Any] = [None] * processes.size
    dist.all_gather_object(everyone, (socket.gethostname(), own))
    (first_host, expected), *others = everyone
    for rank, (host, found) in enumerate(others, 1):
        if odd := [name for name in expected | found if expected.get(name) != found.get(name)]:
            raise UserError(
                f"process {rank} (host {host}) differs from process 0 (host {first_host}) in {', '.join(odd[:4])}"
                f"{' and more' if len(odd) > 4 else ''}: give all machines the same files (an unfinished copy?), code "
                "and arguments"
            )


def code_facts() -> dict[str, Any]:
    """Return what tells versions of the program and of what it computes with apart."""
    digest = hashlib.sha256()
    for name in CODE:
        target = ROOT / name
        for file in sorted(target.rglob("*.py")) if target.is_dir() else [target]:
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    packages = [f"{name} {version(name)}" for name in ("torch", "transformers", "numpy", "tokenizers", "pillow")]
    return {"the code of this program": digest.hexdigest(), "versions": [platform.python_version(), *packages]}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
