"""Killed at any moment and resumed on another layout: the ledger is that of a run that was never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.data import consume
from tests.data.helpers import write_documents
from tests.forks import Fork

STEPS = 60


def start(shards: Path | str, out: Path, world: int, workers: int) -> Fork:
    out.mkdir(exist_ok=True)
    return Fork(consume.main, str(shards), str(out), world, workers, STEPS)


def ledger(out: Path) -> list[tuple[int, list[str]]]:
    """Complete lines: a kill may cut the last one."""
    text = (out / "ledger.jsonl").read_text() if (out / "ledger.jsonl").exists() else ""
    return [tuple(json.loads(line)) for line in text.split("\n")[:-1]]


def kill_after(process: Fork, out: Path, lines: int) -> None:
    """SIGKILL to the process and its workers as soon as the ledger has this many lines."""
    deadline = time.monotonic() + 120
    while len(ledger(out)) < lines and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_killed_and_resumed_on_other_layouts(tmp_path: Path) -> None:
    shards = write_documents(tmp_path / "shards", count=101, per_shard=9)
    assert start(shards, tmp_path / "whole", 1, 0).wait() == 0
    expected = ledger(tmp_path / "whole")
    assert [step for step, _ in expected] == list(range(STEPS))

    out, done = tmp_path / "killed", []
    draw = random.Random(0)
    for world, workers, lines in (
        (2, 1, draw.randint(3, 12)),
        (1, 2, draw.randint(3, 12)),
        (4, 0, draw.randint(3, 12)),
    ):
        begun = len(ledger(out))
        kill_after(start(shards, out, world, workers), out, begun + lines)
        state = out / "state.json"
        saved = json.loads(state.read_text())["step"] if state.exists() else 0
        # What was read after the last state is what a trainer would do again.
        done = [line for line in ledger(out) if line[0] < saved]
        (out / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in done))
    assert 0 < len(done) < STEPS
    assert start(shards, out, 8, 0).wait() == 0
    assert ledger(out) == expected
