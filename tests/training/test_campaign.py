"""A few runs of the kill campaign; all of it: python -m tests.training.campaign --runs 50."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_killed_runs_become_what_they_would_have_been() -> None:
    command = [sys.executable, "-m", "tests.training.campaign", "--runs", "6", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == ["| 1", "| 1 -> 2", "| 2 -> 1", "| 2"]
    assert sum(int(row[2]) for row in rows[2:]) >= 4  # kills
    assert done.stdout.strip().endswith(", 0 wrong")
