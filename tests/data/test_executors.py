"""Other machines do the same work: on Ray and in job arrays the bytes are those of one process, after any kill."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.prepare.executors import engine_options, run_jobs
from data.shards.writer import read_manifest
from flamingo.errors import UserError
from tests.data.sources import command, prepare, refusal
from tests.data.test_prepare_engine import ROOT, SMALL, files, write_tars

LOCAL = ("--engine", "submitit", "--engine-options", "cluster=local")


def run(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """`python -m data prepare pairs ...` as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "data", "prepare", "pairs", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )


def descendants(pid: int) -> Iterator[tuple[int, str]]:
    """(pid, command line) of all processes below one."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in map(int, children):
            yield child, Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            yield from descendants(child)
    except (FileNotFoundError, ProcessLookupError):
        return


def kill_one(process: subprocess.Popen[str], name: str, out: Path, shards: int) -> None:
    """SIGKILL to a worker of this name below a process, as soon as there are so many shards."""
    deadline = time.monotonic() + 200
    while process.poll() is None:
        assert time.monotonic() < deadline
        workers = [pid for pid, line in descendants(process.pid) if re.search(name, line)]
        if workers and len(list(out.glob("pairs-*.tar"))) >= shards:
            os.kill(workers[0], signal.SIGKILL)
            return
        time.sleep(0.01)
    raise AssertionError(
        f"it ended before one of its workers could be killed: {process.stdout and process.stdout.read()}"
    )


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("in"), tars=24, pairs=60)


@pytest.fixture(scope="module")
def whole(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    prepare(out, "pairs", tars, *SMALL)
    return out


@pytest.mark.slow
def test_ray_survives_a_killed_worker(tars: Path, whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "out"
    process = run(tars, "--out", out, *SMALL, "--engine", "ray", "--workers", 2, RAY_ADDRESS="local")
    kill_one(process, r"^ray::_outcome", out, 20)
    said = process.communicate(timeout=250)[0]
    assert process.returncode == 0, said
    assert files(out) == files(whole), said
    assert "24 of 24 units done" in said
    assert f"{out}: pairs: 1,152 of 1,440 documents kept" in said
    # What a user must mend is his one sentence, not a traceback from another process.
    (tmp_path / "cut.tar").write_bytes((tars / "00003.tar").read_bytes()[:3000])
    broken = run(tars, tmp_path / "cut.tar", "--out", tmp_path / "b", "--engine", "ray", "--workers", 2)
    said = broken.communicate(timeout=250)[0]
    assert broken.returncode == 2
    assert re.search(r"^error: .*cut\.tar is truncated", said, re.MULTILINE), said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_job_array_survives_a_killed_task(tars: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = run(tars, "--out", out, *SMALL, "--workers", 2, *LOCAL)
    kill_one(process, r"submitit\.core\._submit", out, 20)
    said = process.communicate(timeout=250)[0]
    assert process.returncode == 0, said
    assert files(out) == files(whole), said
    assert "24 of 24 units done" in said


@pytest.mark.slow
def test_parts_on_a_job_array(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "in")
    prepare(tmp_path / "whole", "pairs", tars, *SMALL)
    for part in (1, 2):
        arguments = ("--out", tmp_path / "parts", *SMALL, "--part", f"{part}/2", "--workers", 1, *LOCAL)
        assert command("prepare", "pairs", tars, *arguments)[0] == 0
    assert command("merge", tmp_path / "parts")[0] == 0
    merged = {name: body for name, body in files(tmp_path / "parts").items() if not name.startswith("_part")}
    assert merged == files(tmp_path / "whole")


@pytest.mark.slow
def test_deduplication_counts_on_the_engine_too(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "in", tars=4)
    prepare(tmp_path / "whole", "deduplicate", tars)
    assert command("prepare", "dedupe", tars, "--out", tmp_path / "out", "--workers", 2, *LOCAL)[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.slow
def test_what_a_job_raises_is_a_sentence_and_finished_units_are_kept(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "in")
    cut = tars / "00003.tar"
    good = cut.read_bytes()
    cut.write_bytes(good[:3000])
    out = tmp_path / "out"
    assert "00003.tar is truncated" in refusal(out, "pairs", tars, *SMALL, *LOCAL)
    assert read_manifest(out)["parts"] == {}
    assert list((out / ".prepare" / "pairs-all").glob("pairs-*.json"))
    cut.write_bytes(good)
    assert "unfinished preparation with other inputs" in refusal(out, "pairs", tars, *SMALL, *LOCAL)


@pytest.mark.slow
def test_a_job_that_always_dies_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.prepare.executors.TRIES", 2)  # submitit waits 15 s for each
    jobs = {1: (1,), 2: (1,)}
    with pytest.raises(UserError, match=r"2 jobs died 2 times \(.*logs in .*finished units are kept"):
        list(run_jobs(os._exit, jobs, engine="submitit", workers=1, options=["cluster=local"], folder=tmp_path))


@pytest.mark.slow
def test_a_result_of_an_earlier_run_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "1.json").write_text(json.dumps({"result": "old"}))
    done = run_jobs(abs, {1: (-3,)}, engine="submitit", workers=1, options=[*LOCAL[3:]], folder=tmp_path)
    assert list(done) == [(1, 3)]


def test_a_machine_that_does_not_see_the_state_writes_nothing(tmp_path: Path) -> None:
    from data.prepare.engine import run_unit
    from data.prepare.units import InputUnit

    args = argparse.Namespace(state=str(tmp_path / "gone"), digest="x", out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"does not see .*gone: all machines of --engine need the same folders"):
        run_unit("pairs", args, 0, InputUnit("a", "a"))
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "fingerprint").write_text("of another run")
    with pytest.raises(UserError, match="now belongs to another preparation"):
        run_unit("pairs", args, 0, InputUnit("a", "a"))
    assert not (tmp_path / "out").exists()


def test_options_and_mistakes(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "in", tars=2)
    assert engine_options(["memory=8e9", "slurm_partition=cpu", "a=b=c"]) == {
        "memory": 8e9,
        "slurm_partition": "cpu",
        "a": "b=c",
    }
    out = tmp_path / "out"
    assert "must be NAME=VALUE" in refusal(out, "pairs", tars, "--engine", "submitit", "--engine-options", "cpus")
    assert "processes have none" in refusal(out, "pairs", tars, "--engine-options", "cpus=2")
    wrong = (*LOCAL, "slurm_nonsense=1")
    assert "submitit refuses cluster 'local'" in refusal(out, "pairs", tars, *wrong)
    store = ("--out", "memory://out", tars, *LOCAL)
    status, _, err = command("prepare", "pairs", *store)
    assert (status, "needs --scratch DIR: a folder that all machines see" in err) == (2, True)
