"""Real runs of train.py in processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp
import yaml

from flamingo.training.config import TrainConfig
from flamingo.training.distributed.fsdp import exit_process
from tests.forks import Fork
from train import train

ROOT = Path(__file__).resolve().parents[2]


def given(settings: TrainConfig, folder: Path) -> list[str]:
    """Arguments of train.py that give exactly these settings, through a YAML of their own."""
    where = folder / f"settings-{Path(settings.run.dir).name}"
    (where / "experiment").mkdir(parents=True, exist_ok=True)
    body = yaml.safe_dump(json.loads(json.dumps(settings.as_dict())))
    (where / "experiment" / "given.yaml").write_text(f"# @package _global_\n{body}")
    return [f"hydra.searchpath=[file://{where}]", "experiment=given"]


def torchrun(*options: str) -> list[str]:
    """The command before train.py."""
    return [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train.py")]


def begin(command: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Starts a command in its own session, everything it says going to `log`."""
    with log.open("ab") as file:
        told = {**os.environ, **environment}
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, env=told, cwd=ROOT)


def begin_two(programs: list[str], arguments: list[str], folder: Path) -> list[Fork]:
    """Starts both processes of a run without torchrun, each with its program in Python and its `log-RANK`."""
    port = free_port()
    return [
        Fork(_run_program, program, arguments, _told(rank, 2, port), log=folder / f"log-{rank}")
        for rank, program in enumerate(programs)
    ]


def _run_program(program: str, arguments: list[str], told: dict[str, str]) -> None:
    os.environ.update(told)
    sys.argv[1:] = arguments
    exec(program, {"__name__": "__main__"})


def _told(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells each process."""
    told = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {**{name: str(value) for name, value in told.items()}, "MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """What a run has logged; a line in the making is left out."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def losses(run_dir: Path, key: str = "loss") -> list[float]:
    """What a run has logged under a key, a figure for each line."""
    found = [line[key] for line in lines(run_dir)]
    assert found, f"{run_dir} has logged nothing"
    return found


def train_on(size: int, settings: TrainConfig) -> list[dict[str, Any]]:
    """Train in `size` new processes, as torchrun's would be told who they are; return what the run has logged.

    They are forks of a server that has imported everything: seconds less than torchrun takes, which is for tests of it.
    """
    mp.start_processes(_train, args=(size, free_port(), settings), nprocs=size, start_method="forkserver")
    return lines(Path(settings.run.dir))


def _train(rank: int, size: int, port: int, settings: TrainConfig) -> None:
    mp.set_start_method(None, force=True)
    os.environ.update(_told(rank, size, port))
    train(settings)
    exit_process(0)


def on_one_and_two_processes(settings: Callable[[Path], TrainConfig], folder: Path) -> tuple[list[float], list[float]]:
    """The losses of a run on one process and on two."""
    for size in (1, 2):
        train_on(size, settings(folder / f"run-{size}"))
    return losses(folder / "run-1"), losses(folder / "run-2")


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]
