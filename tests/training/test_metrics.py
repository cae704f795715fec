"""`metrics.jsonl` after a kill and a resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from flamingo.training.metrics.loss_plot import draw_losses, read_metrics, smooth
from flamingo.training.metrics.sinks import JsonLines


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
