"""The benchmark: its arithmetic agrees with the counter, both libraries compute the same, and its command runs."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import evaluation, gpu, gpu_steps, measure, steps
from benchmarks.idefics import Idefics, OursAsIdefics
from benchmarks.ours import Ours
from benchmarks.sizes import SIZES
from benchmarks.table import print_tables
from benchmarks.work import IGNORED, class_names, image_id, prompt, training_steps
from tests.forks import Fork, run, run_python

ROOT = Path(__file__).resolve().parents[1]
TINY = SIZES["tiny"]
peer = pytest.mark.skipif(
    importlib.util.find_spec("open_flamingo") is None,
    reason="pip install --no-deps open_flamingo==2.0.1 einops-exts",
)


def options(**own: int) -> argparse.Namespace:
    return argparse.Namespace(**{"repeats": 1, "shots": 2, "images": 3, "tokens": 64, **own})


def test_the_work() -> None:
    row = prompt(TINY, 3)
    assert int((row.ids == image_id(TINY)).sum()) == len(row.images) == 4
    assert set(row.labels[row.ids == image_id(TINY)].tolist()) == {IGNORED}
    counts = [len(row.images) for rows in training_steps(SIZES["small"])[1:] for row in rows]
    assert sum(counts) / len(counts) == 2.5
    assert (min(counts), max(counts)) == (1, 5)
    assert len(class_names(SIZES["small"])) == 100


@pytest.mark.parametrize("what", ["decode_step", "first_token", "ranking", "forward"])
def test_we_do_what_is_needed_and_no_more(what: str) -> None:
    """Compare counted operations with the arithmetic; full instead of causal attention makes the small excess."""
    library = Ours(TINY)
    library.model.requires_grad_(False)
    figures = measure.WHAT[what](library, TINY, options())
    assert 0.99 <= figures["flop"] / figures["needed"] <= 1.02
    assert figures["seconds"]
    assert min(figures["seconds"]) > 0


def test_a_training_step_does_little_more_than_is_needed() -> None:
    figures = measure.train_step(Ours(TINY), TINY, options())
    assert 0.99 <= figures["flop"] / figures["needed"] <= 1.1
    assert len(figures["values"]) == len(TINY.counts)


@pytest.mark.parametrize(("batch", "images", "tokens"), [(1, 1, 64), (2, 3, 48), (2, 5, 128)])
def test_the_cost_of_a_step_is_counted_as_it_is_needed(batch: int, images: int, tokens: int) -> None:
    """Compare with the counter of a run; the arithmetic is a little lower: it counts half of causal attention."""
    chosen = options(batch=batch, images=images, tokens=tokens)
    figures = steps.step_cost(Ours(TINY), TINY, chosen)
    assert 0.99 <= figures["flop"] / figures["needed"] <= 1.1
    assert len(figures["values"]) == 2


@pytest.mark.slow
def test_the_table_of_steps(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "step_cost", "--size", "tiny", "--threads", "1", "--repeats", "1"]
    few = ["--batches", "1", "2", "--images", "1", "--tokens", "64", "--out", str(tmp_path / "found.json")]
    done = subprocess.run([*command, *few], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[:3] for row in rows[2:]] == [["| 1", "1", "64"], ["| 2", "1", "64"]]


@pytest.mark.slow
@peer
def test_both_compute_the_same() -> None:
    """Compare logits, tokens, losses, and scores in both variants of the peer, which does far more work for them."""
    from benchmarks.peer import Peer

    results: dict[str, dict[str, Any]] = {}
    for library in (Ours(TINY), Peer(TINY)):
        losses = measure.train_step(library, TINY, options())
        library.model.eval().requires_grad_(False)
        figures = {what: measure.WHAT[what](library, TINY, options()) for what in measure.WHAT if what != "train_step"}
        results[type(library).__name__] = {"train_step": losses, **figures}
    ours, theirs = results["Ours"], results["Peer"]
    for what in ("train_step", "ranking", "forward"):
        difference = torch.tensor(ours[what]["values"]) - torch.tensor(theirs[what]["values"])
        assert float(difference.abs().max()) < 1e-4, what
    for what in ("decode_step", "first_token"):
        assert ours[what]["values"] == theirs[what]["values"]
        assert theirs[what]["flop"] > 2.5 * ours[what]["flop"]
    copied = Peer(TINY, "copied_cache").rank(prompt(TINY, 2), class_names(TINY))
    fresh = torch.tensor(Ours(TINY).rank(prompt(TINY, 2), class_names(TINY)))
    torch.testing.assert_close(torch.tensor(copied), fresh, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_we_compute_the_same_as_idefics_with_its_weights() -> None:
    results: dict[str, dict[str, Any]] = {}
    for library in (Idefics(TINY), OursAsIdefics(TINY)):
        trained = sum(parameter.numel() for parameter in library.model.parameters() if parameter.requires_grad)
        losses = measure.train_step(library, TINY, options())
        library.model.eval().requires_grad_(False)
        figures = {what: measure.WHAT[what](library, TINY, options()) for what in measure.WHAT if what != "train_step"}
        results[type(library).__name__] = {"train_step": losses, "trained": trained, **figures}
    theirs, ours = results.values()
    assert ours["trained"] == theirs["trained"]
    for what in ("train_step", "ranking", "forward"):
        difference = torch.tensor(ours[what]["values"]) - torch.tensor(theirs[what]["values"])
        assert float(difference.abs().max()) < 1e-3, what
    for what in ("decode_step", "first_token"):
        assert ours[what]["values"] == theirs[what]["values"]


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "benchmarks", "decode_step", "--size", "tiny", "--without-peer"]
    done = subprocess.run(
        [*command, "--threads", "1", "--repeats", "1", "--out", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "decode step, 4 shots | ours fp32" in done.stdout
    document = json.loads(out.read_text())
    assert [result["variant"] for result in document["results"]] == ["fp32", "bf16"]
    own = document["results"][0]
    document["size"] = "small"
    document["results"] = [{**own, "library": "peer", "seconds": [10.0]}, own]
    print_tables(document)
    assert "0.333: yes | same tokens" in capsys.readouterr().out
    wrong = subprocess.run([*command[:3], "decode"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "known are decode_step, first_token" in wrong.stderr


def test_the_evaluation_encodes_each_image_once_and_then_none() -> None:
    library = Ours(TINY)
    library.model.requires_grad_(False)
    for what, queries in (("eval_questions", TINY.eval_queries), ("eval_classes", TINY.eval_ranked)):
        figures = evaluation.WHAT[what](library, TINY, options(shots=4))
        assert figures["encoded"] == figures["distinct"] <= queries + TINY.eval_support
        assert figures["again_encoded"] == 0
        assert len(figures["values"]) == queries * (TINY.names if what == "eval_classes" else evaluation.NEW_TOKENS)


@pytest.mark.slow
@peer
def test_both_evaluations_give_the_same_and_the_peer_encodes_again(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.peer import Peer

    results = []
    for library, name in ((Peer(TINY), "peer"), (Ours(TINY), "ours")):
        library.model.eval().requires_grad_(False)
        for what in evaluation.WHAT:
            figures = evaluation.WHAT[what](library, TINY, options(shots=4))
            results.append({"name": "eval_speed", "what": what, "shots": 4, "library": name, **figures})
    (answers, scores), (own_answers, own_scores) = results[:2], results[2:]
    assert own_answers["values"] == answers["values"]
    assert own_scores["values"] == pytest.approx(scores["values"], abs=2e-4)
    assert answers["encoded"] == TINY.eval_queries * 5 > 2 * answers["distinct"]
    evaluation.print_evaluation({"size": "tiny", "results": results})
    assert "same tokens" in capsys.readouterr().out


class ForkedStep:
    """A step's process, but for its start."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log, self.fork = log, Fork(run_python, command[1:], ROOT, dict(os.environ), log=log)
        self.pid, self.poll = self.fork.pid, self.fork.poll

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.returncode = self.fork.wait(timeout)
        said = self.log.read_text()
        return "\n".join(line for line in said.splitlines() if line.startswith("[{")), said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_for_a_gpu_runs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step begins as a user's do; all of them as forks, which need not import everything again."""
    out = tmp_path / "gpu.json"
    chosen = ["--device", "cpu", "--size", "tiny", "--seconds", "5400", "--out", str(out)]
    wrong = run([sys.executable, "-m", "benchmarks", "gpu", "dekode", *chosen], ROOT)
    assert (wrong.returncode, "'dekode' is not a step" in wrong.stderr) == (2, True)
    assert gpu.measured("device", "tiny", "cpu", 300.0)["rows"]
    for limits in ("ONCE", "SIZED"):  # a busy machine is no failure
        monkeypatch.setattr(gpu, limits, {name: 10 * seconds for name, seconds in getattr(gpu, limits).items()})
    logs = (tmp_path / f"log-{number}" for number in itertools.count())
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **own: ForkedStep(command, next(logs)))
    status = gpu.main(chosen)
    stdout = capsys.readouterr().out
    results = {result["step"]: result for result in json.loads(out.read_text())["results"]}
    assert list(results) == [*gpu.ONCE, *gpu.SIZED] == list(gpu_steps.STEPS)
    assert not [result for result in results.values() if "failed" in result], stdout
    assert status == 0, stdout
    for name, result in results.items():
        assert f"| {name}" in stdout
        assert result["rows"], name
        assert all(row["holds"] in (True, None) for row in result["rows"]), name


def test_a_step_that_fails_or_takes_too_long_says_so_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps here are programs that end at once, raise, hang with a child of theirs, and print no rows."""
    row = {"what": "it", "value": 1.5, "wanted": "", "holds": None}
    bodies = {
        "device": f"print({json.dumps(json.dumps([row]))})",
        "attention": "raise RuntimeError('no | kernel')",
        "collectives": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])",
        "train": "print('nothing')",
    }
    popen = subprocess.Popen
    monkeypatch.setattr(gpu, "SIZED", {"train": 60.0})
    monkeypatch.setattr(gpu, "ONCE", {"device": 60.0, "attention": 60.0, "collectives": 2.0})
    monkeypatch.setattr(
        gpu.subprocess, "Popen", lambda command, **own: popen([sys.executable, "-c", bodies[command[3]]], **own)
    )
    out = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--size", "tiny", "--out", str(out)]) == 1
    results = json.loads(out.read_text())["results"]
    failures = [result.get("failed") for result in results]
    assert failures == [None, "RuntimeError: no | kernel", "took more than its 2 s", "ended with status 0"]
    assert "| attention | FAILED | RuntimeError: no / kernel |" in capsys.readouterr().out
    assert gpu.main(["--device", "cpu", "--size", "tiny", "--out", str(out), "--seconds", "0"]) == 1
    assert "not run: 0 s are over" in capsys.readouterr().out


def test_mistakes_of_the_command_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in ((["dekode"], "'dekode' is not a step"), ([], "torch sees no GPU here")):
        if not arguments and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit) as caught:
            gpu.main(arguments)
        assert caught.value.code == 2
        assert sentence in capsys.readouterr().err
