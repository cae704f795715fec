"""Whole runs, killed, shared between processes, started again: always the same results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main
from eval.reports.results import VOLATILE
from eval.reports.saved_run import problems, read_run
from flamingo.configs.compose import CONFIGS
from tests.eval.worlds import write_pool, write_scenes
from tests.model import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model, processor = tiny.flamingo("llama")
    model.save_pretrained(folder / "model", built_modules=True)
    processor.save_pretrained(folder / "model")
    write_scenes(folder / "data" / "toy" / "heldout" / "scene_pairs", 60)
    write_pool(folder / "data" / "toy" / "heldout" / "glyph_pairs")
    write_pool(folder / "data" / "toy" / "heldout" / "binding")
    return folder


def options(saved: Path, out: Path, *more: str) -> list[str]:
    own = [f"model={saved / 'model'}", f"data={saved / 'data'}", f"out={out}", f"cache={out}.cache", "progress=false"]
    own += ["task=[toy_vqa,toy_binding]", "task.toy_vqa.queries=30", "task.toy_vqa.max_new_tokens=4"]
    own += ["task.toy_binding.min_images=3", "task.toy_binding.queries=24", "shots=[0,2]", "images=[real,blank]"]
    return [*own, "batch_size=4", "gallery=0", *more]


def launch(arguments: list[str], *torchrun: str) -> subprocess.Popen[str]:
    start = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    command = [sys.executable, *start, "-m", "eval", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=CONFIGS.parent, env=dict(os.environ), stdout=pipe, stderr=pipe, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return out


def results(out: Path) -> dict[str, Any]:
    assert problems(read_run(out)) == []
    found = json.loads((out / "results.json").read_text())
    return {key: value for key, value in found.items() if key not in VOLATILE}


@pytest.fixture(scope="module")
def whole(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(options(saved, out)) == 0
    return out


def test_a_killed_run_continues_and_ends_with_the_same_results(saved: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = launch(options(saved, out))
    log = out / "responses.jsonl"
    deadline = time.monotonic() + 240
    while (not log.exists() or log.read_bytes().count(b"\n") < 12) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (out / "results.json").exists()
    known = log.read_bytes().count(b"\n")
    assert known >= 12
    assert main(options(saved, out)) == 0
    assert results(out) == results(whole)
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    counts, complete = (json.loads((f / "results.json").read_text()) for f in (out, whole))
    assert counts["responses"]["from_log"] >= known
    assert counts["responses"]["asked"] <= complete["responses"]["asked"] - known + 4
    assert counts["images"]["encoded"] < complete["images"]["encoded"] == complete["images"]["distinct"]


def test_two_ranks_are_one(saved: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = finished(launch(options(saved, out), "--nproc-per-node=2", "--master-port=0", "--standalone"))
    assert said.count("toy_vqa") == 4  # one rank prints
    assert results(out) == results(whole)
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    two, one = (json.loads((folder / "results.json").read_text()) for folder in (out, whole))
    assert (two["processes"], one["processes"]) == (2, 1)
    assert two["images"] == one["images"]
    assert two["responses"] == one["responses"]
    shares = [(out / name).read_bytes().count(b"\n") for name in ("responses.jsonl", "responses.1.jsonl")]
    assert sum(shares) == one["responses"]["asked"]
    assert min(shares) > 0.3 * sum(shares)


def test_another_number_of_shots_encodes_nothing_and_asks_only_what_is_new(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(options(saved, out, "shots=[2]", "images=[real]")) == 0
    first = json.loads((out / "results.json").read_text())
    assert main(options(saved, out, "shots=[0,1,2]", "images=[real]")) == 0
    second = json.loads((out / "results.json").read_text())
    assert first["images"]["encoded"] == first["images"]["distinct"]
    assert second["images"]["encoded"] == 0
    assert second["responses"]["from_log"] == first["responses"]["asked"]
    same = [[row for row in found["rows"] if row["shots"] == 2] for found in (first, second)]
    assert same[0] == same[1]
