"""Signals to a whole process group: workers outlive them until the trainer has saved, and never outlive the trainer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.helpers import write_documents

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def start(folder: Path, what: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A process in a group of its own, and its workers."""
    command = [sys.executable, "-m", "tests.data.signalled", str(write_documents(folder)), what]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def alive(pid: int) -> bool:
    """Whether a process runs (one that ended and was not waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: list[int], within: float) -> bool:
    """Whether all of them end in time."""
    end = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_group_leaves_the_workers_until_the_trainer_has_saved(tmp_path: Path, number: int) -> None:
    process, workers = start(tmp_path, "saving")
    assert len(workers) == 2
    os.killpg(process.pid, number)
    time.sleep(0.3)
    os.killpg(process.pid, number)  # schedulers say it more than once
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.startswith("saved ")
    assert gone(workers, 10)


def test_workers_end_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    process, workers = start(tmp_path, "waiting")
    process.kill()
    process.communicate(timeout=60)
    assert gone(workers, 10)


def test_a_worker_that_hangs_does_not_keep_the_trainer_from_ending(tmp_path: Path) -> None:
    process, workers = start(tmp_path, "hanging")
    begun = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 7
    assert time.monotonic() - begun < 40
    assert gone(workers, 10)
