"""`make demo` from its first command to its last, on tiny data: every step reads what the one before it wrote."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", ["demo", "learn"])
def test_demo_runs_end_to_end_and_again_at_once(tmp_path: Path, which: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    out = tmp_path / "demo"
    command = [
        "make",
        "demo",
        f"WHICH={which}",
        f"VENV={sys.prefix}",
        f"--assume-old={sys.prefix}/.installed",  # this environment is the installation
        f"OUT={out}",
        "TOY_ARGS=--scale 0.02 --processes 1",
        "DIGITS_ARGS=--documents 40",
        "TRAIN_ARGS=run.steps=2 run.log_every=1 run.tensorboard=false",
        f"TASKS=[toy_caption,toy_vqa,{'digits_naming' if which == 'demo' else 'digits_binding'}]",
        "EVAL_ARGS=limit=4 shots=[0,1] gallery=2 task.toy_caption.queries=8 task.toy_vqa.queries=8",
    ]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-3000:]
    for name in ("eval/results.json", "eval/samples.jsonl", "eval/curve.png", "eval/gallery.html", "flamingo/loss.png"):
        assert (out / name).stat().st_size > 0, name
    results = json.loads((out / "eval" / "results.json").read_text())
    assert results
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("/checkpoints/step-00000002") == 3  # resumed, and nothing left to do
