"""A few runs of the kill campaign; all of it: python -m tests.training.campaign --runs 50."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_killed_runs_become_what_they_would_have_been() -> None:
    command = [sys.executable, "-m", "tests.training.campaign", "--runs", "5", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "wrong=[]" in done.stdout
