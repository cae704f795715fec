"""`python -m data bench` from end to end at a tiny size, and how its table judges what was measured."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from data.bench import table
from data.bench.table import LEAST_FILL, speed_rows
from tests import forks
from tests.data.sources import command


def measured(documents: float, cpu: float, private: float = 1e8) -> dict[str, float]:
    return {"documents": documents, "images": 2 * documents, "cpu": cpu, "private": private, "read": 1.0}


def test_ratios_are_taken_within_a_round() -> None:
    found = {
        ("peer", "mmc4"): [measured(10, 1), measured(10, 4), measured(10, 1)],  # the second round met a busy machine
        ("ours", "mmc4"): [measured(40, 1), measured(40, 3), measured(40, 1)],
        ("peer", "pairs"): [measured(100, 1)],
        ("ours", "pairs"): [measured(240, 1, private=4e8)],
        ("ours", "raw"): [measured(50, 1)],
    }
    rows = {label: tuple(rest) for label, *rest in speed_rows(found)}
    assert rows["open_flamingo's MMC4 shards: documents/s/core"] == (
        "10.0",
        "40.0",
        "4.00 (4.00 to 5.33)",
        ">= 3.0",
        True,
    )
    assert rows["pairs: documents/s/core"] == ("100.0", "240.0", "2.40 (2.40 to 2.40)", ">= 2.5", False)
    assert rows["the same documents, raw members: documents/s/core"] == ("", "50.0", "", "", True)
    assert rows["pairs: private MB a worker"] == ("100", "400", "", "<= 300", False)
    assert rows["pairs: seen images/s/core"][-1] is True


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_runs_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loaders' processes are forks, which have imported everything, and the tar to be indexed is a small one."""
    new = subprocess.run

    def run(command: list[str], **own: Any) -> subprocess.CompletedProcess[str]:
        return forks.run(command, own["cwd"]) if "data.bench.measure" in command else new(command, **own)

    monkeypatch.setattr(table.subprocess, "run", run)
    monkeypatch.setattr(table.index_rate, "__defaults__", (2_000,))
    sizes = ["--documents", 24, "--pairs", 200, "--rounds", 1, "--count", 2, "--warm", 1, "--layers", 1]
    status, shown, said = command("bench", "--out", tmp_path, *sizes)
    assert status in (0, 1), said  # so small it may well be slow
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert len(rows) == 6 + 3 + 3 + 1 + 3 + 3
    for label, *_ in rows:
        assert label in shown
    values = {label: (peer, ours) for label, peer, ours, *_ in rows}
    for label in ("open_flamingo's MMC4 shards: documents/s/core", "pairs: documents/s/core"):
        assert all(float(value) > 0 for value in values[label])
    for what in ("open_flamingo's MMC4 shards", "pairs", "the same documents, raw members"):
        assert 1.0 <= float(values[f"{what}: bytes read/used"][1]) <= 1.05
    assert float(values["the same, packed in rows of 256"][1]) >= LEAST_FILL
    feeding = "packed pairs, 224 px, 2 workers"
    assert 0 <= float(values[f"{feeding}: share of a step spent waiting"][1]) <= 1
    assert 0 < float(values[f"{feeding}: loader's share of processor time"][1]) < 1
    assert float(values[f"{feeding}: images/s trained on"][1]) > 0
    rounds = json.loads((tmp_path / "rounds.json").read_text())
    assert set(rounds) == {"peer mmc4", "ours mmc4", "peer pairs", "ours pairs", "ours raw"}


def test_mistakes(tmp_path: Path) -> None:
    status, _, said = command("bench", "--out", tmp_path, "--rounds", 0)
    assert status == 2
    assert "must be at least 1" in said
