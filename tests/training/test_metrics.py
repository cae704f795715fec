"""`metrics.jsonl` after a kill and a resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flamingo.training.metrics import sinks
from flamingo.training.metrics.loss_plot import draw_losses, read_metrics, smooth
from flamingo.training.metrics.sinks import JsonLines, ProgressLine


def test_resume_drops_what_lies_beyond_and_the_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, resume_step=0)
    for step in (1, 2, 3):
        sink.log(step, {"loss": float(step)})
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    again = JsonLines(path, resume_step=2)
    again.log(3, {"loss": 30.0})
    again.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 30.0},
    ]


def test_curve_is_drawn(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl", resume_step=0)
    for step in range(1, 30):
        sink.log(step, {"loss": 1 / step, "loss/a": 1 / step, "lr": 0.1})
    sink.close()
    assert read_metrics(tmp_path / "metrics.jsonl")["lr"][0] == (1, 0.1)
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", title="toy")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_smooth_is_a_mean() -> None:
    assert np.allclose(smooth(np.ones(50)), 1.0)
    assert smooth(np.arange(41.0))[20] == 20.0


def test_the_time_that_is_left_is_not_taken_from_the_first_update(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first update takes five minutes here, all others ten seconds; the run resumed at 100."""
    now = 0.0
    monkeypatch.setattr(sinks.time, "monotonic", lambda: now)
    line = ProgressLine("flamingo", total=200, start=100)
    shown = []
    for step, seconds in ((101, 300.0), (102, 310.0), (110, 390.0), (200, 1290.0)):
        now = seconds
        line.update(step, "loss 1.0")
        shown.append(capsys.readouterr().err.strip())
    assert shown == [
        "flamingo  101/200  loss 1.0",
        "flamingo  102/200  loss 1.0  16:20 left",
        "flamingo  110/200  loss 1.0  15:00 left",
        "flamingo  200/200  loss 1.0  0:00 left",
    ]
