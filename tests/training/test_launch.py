"""Ways of starting a run: who a process is, torchrun on two nodes, elastic restarts, submitit, SLURM's sbatch."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flamingo.errors import UserError
from flamingo.training.compose import compose
from flamingo.training.distributed.fsdp import set_threads
from flamingo.training.distributed.launch import first_host, join_launcher, restarted
from tests.training.commands import ROOT, begin, begin_two, children, free_port, given, lines, torchrun, train_on
from tests.training.world import config, write_world

# CPU time of tests is not theirs alone: how long something real may take.
PATIENCE = 280
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run on one process."""
    folder = tmp_path_factory.mktemp("whole")
    return [line["loss"] for line in train_on(1, config(world, folder / "run", "flamingo", steps=12))]


def test_a_task_of_srun_is_told_who_it_is() -> None:
    slurm = {
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[007,009]",
        "SLURM_JOB_ID": "42",
    }
    told = dict(slurm)
    join_launcher(told)
    assert {key: told[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu007",
    }
    other = {**slurm, "SLURM_PROCID": "0"}
    join_launcher(other)
    assert other["MASTER_PORT"] == told["MASTER_PORT"]
    under_torchrun = {**slurm, "RANK": "3", "WORLD_SIZE": "4"}
    join_launcher(under_torchrun)
    assert under_torchrun["WORLD_SIZE"] == "4"
    shell = {"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}
    join_launcher(shell)
    assert "RANK" not in shell
    assert first_host("rack[1-2]n[03-04],x") == "rack1n03"
    assert [restarted({}), restarted({"SLURM_RESTART_COUNT": "2"})] == [False, True]


@pytest.mark.parametrize(
    ("environment", "cores", "threads", "expected"),
    [
        ({}, 6, 0, 6),
        ({}, 6, 3, 3),
        ({"OMP_NUM_THREADS": "2"}, 6, 0, 2),
        ({"OMP_NUM_THREADS": "4,2"}, 6, 0, 4),
        ({"OMP_NUM_THREADS": "2"}, 6, 3, 3),
        ({"OMP_NUM_THREADS": "many"}, 6, 0, 6),
        ({"LOCAL_WORLD_SIZE": "2"}, 6, 0, 3),
        ({"LOCAL_WORLD_SIZE": "8"}, 6, 0, 1),
        # torchrun sets 1 itself where it starts several; any other value is the user's.
        ({"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}, 6, 0, 3),
        ({"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "2"}, 6, 0, 2),
        ({"LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}, 6, 0, 1),
        # srun gives each task cores of its own, or all of them to all.
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4"}, 3, 0, 3),
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4"}, 16, 0, 4),
    ],
)
def test_threads_are_those_that_are_given(
    environment: dict[str, str], cores: int, threads: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    set_threads(threads, 1)
    assert found == [expected]


def test_threads_of_a_real_process_on_one_core() -> None:
    """Under taskset, as containers and schedulers bind processes."""
    code = "import torch; from flamingo.training.distributed.fsdp import set_threads; set_threads(0, 1); "
    code += "print(torch.get_num_threads())"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    core = str(min(os.sched_getaffinity(0)))
    command = ["taskset", "-c", core, sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


@pytest.mark.slow
def test_two_nodes_are_one_process(world: Path, tmp_path: Path, whole: list[float]) -> None:
    """Two torchrun agents that meet over loopback, each with one process."""
    arguments = given(config(world, tmp_path / "run", "flamingo", steps=12), tmp_path)
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
    agents = [
        begin([*torchrun("--nnodes=2", "--nproc-per-node=1", *meeting), *arguments], tmp_path / f"log-{node}")
        for node in range(2)
    ]
    statuses = [agent.wait(PATIENCE) for agent in agents]
    assert statuses == [0, 0], [(tmp_path / f"log-{node}").read_text()[-2000:] for node in range(2)]
    assert [line["loss"] for line in lines(tmp_path / "run")] == pytest.approx(whole, abs=1e-5)


@pytest.mark.slow
def test_a_killed_worker_is_started_again_from_the_last_checkpoint(world: Path, tmp_path: Path) -> None:
    """torchrun --max-restarts: SIGKILL to one of two; the group comes back by itself and loses nothing."""
    settings = config(world, tmp_path / "run", "flamingo", steps=24, checkpoint_every=4)
    agent = begin(
        [*torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=2"), *given(settings, tmp_path)],
        tmp_path / "log",
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    deadline = time.monotonic() + PATIENCE
    while len(lines(tmp_path / "run")) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(children(agent.pid)[1], signal.SIGKILL)
    assert agent.wait(PATIENCE) == 0, (tmp_path / "log").read_text()[-3000:]
    log = (tmp_path / "log").read_text()
    assert "resumed" in log
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found] == list(range(1, 25))
    again = train_on(2, config(world, tmp_path / "again", "flamingo", steps=24))
    assert [line["loss"] for line in found] == [line["loss"] for line in again]


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(world: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path / "run", "flamingo", steps=300, checkpoint_every=1000)
    command = [sys.executable, str(ROOT / "train.py"), *given(settings, tmp_path)]
    process = begin(command, tmp_path / "log")
    deadline = time.monotonic() + PATIENCE
    while len(lines(tmp_path / "run")) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    log = (tmp_path / "log").read_text()
    assert "stopped by SIGTERM, saved in " in log
    assert "Traceback" not in log
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(saved.name[-8:]) == len(lines(tmp_path / "run"))


@pytest.mark.slow
def test_an_exception_names_its_process_and_stops_the_others(world: Path, tmp_path: Path) -> None:
    """Process 1 cannot write what process 0 does not write; without torchrun's agent, which would end process 0."""
    settings = config(world, tmp_path / "run", "flamingo", steps=100000, checkpoint_every=1000)
    code = (
        "import os, sys, train, flamingo.training.metrics.throughput as metrics\n"
        "if os.environ['RANK'] == '1':\n"
        "    count = iter(range(10**6))\n"
        "    plain = metrics.Throughput.add\n"
        "    def add(self, *given):\n"
        "        if next(count) == 5: raise ZeroDivisionError('in the middle')\n"
        "        plain(self, *given)\n"
        "    metrics.Throughput.add = add\n"
        "train.compose.main(train.train, check=lambda config: [])\n"
    )
    ranks = begin_two([code] * 2, given(settings, tmp_path), tmp_path)
    assert ranks[1].wait(PATIENCE) == 1
    ended = time.monotonic()
    assert ranks[0].wait(60) == 1
    assert time.monotonic() - ended < 60
    first, second = ((tmp_path / f"log-{rank}").read_text() for rank in range(2))
    assert "process 1 of 2 on" in second
    assert "ZeroDivisionError: in the middle" in second
    assert "process 1 of 2 (host" in first or "process 0 of 2 on" in first


@pytest.mark.slow
def test_submitit_starts_a_process_each(world: Path, tmp_path: Path, whole: list[float]) -> None:
    """The way of launch=slurm, with submitit's executor for one machine."""
    arguments = given(config(world, tmp_path / "run", "flamingo", steps=12), tmp_path)
    command = [sys.executable, "train.py", "-m", *arguments, "launch=local", "launch.processes=2"]
    done = begin(command, tmp_path / "log")
    assert done.wait(PATIENCE) == 0, (tmp_path / "log").read_text()[-3000:]
    assert [line["loss"] for line in lines(tmp_path / "run")] == pytest.approx(whole, abs=1e-5)
    assert f"model in {tmp_path / 'run' / 'model'}" in (tmp_path / "log").read_text()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "checkpoints", "model", "launch"}
    assert not list((tmp_path / "run").rglob("*%j*"))
    logs = sorted(path.name.split("_", 1)[1] for path in (tmp_path / "run" / "launch").rglob("*_log.out"))
    assert logs == ["0_log.out", "1_log.out"]


@pytest.mark.slow
def test_submitit_queues_a_run_again_that_was_preempted(world: Path, tmp_path: Path, whole: list[float]) -> None:
    """SIGUSR2 to one of two tasks, as SLURM sends it: both save after the same update, and the job starts anew."""
    settings = config(world, tmp_path / "run", "flamingo", steps=12, checkpoint_every=1000)
    command = [sys.executable, "train.py", "-m", *given(settings, tmp_path), "launch=local", "launch.processes=2"]
    launcher = begin(command, tmp_path / "log")
    deadline = time.monotonic() + PATIENCE
    while len(lines(tmp_path / "run")) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    tasks = [pid for controller in children(launcher.pid) for pid in children(controller)]
    os.kill(tasks[-1], signal.SIGUSR2)
    assert launcher.wait(PATIENCE) == 0, (tmp_path / "log").read_text()[-3000:]
    said = "".join(path.read_text() for path in (tmp_path / "run" / "launch").rglob("*_log.*"))
    assert "stopped by SIGUSR2, saved in" in said
    assert "resumed" in said
    assert [line["loss"] for line in lines(tmp_path / "run")] == pytest.approx(whole, abs=1e-5)


def test_launchers_are_chosen_like_any_group() -> None:
    chosen = compose(["launch=slurm", "nodes=4", "launch.gpus=4"])
    assert (chosen.nodes, chosen.launch.gpus, chosen.launch.processes) == (4, 4, 8)
    with pytest.raises(UserError, match=r"launch\.processes=0 must be at least 1"):
        compose(["launch.processes=0"])


@pytest.mark.slow
def test_what_sbatch_is_given(world: Path, tmp_path: Path) -> None:
    """Stand-ins for SLURM's commands: sbatch keeps its script, sacct says that the job is gone."""
    for name, body in {
        "sbatch": f'cp "$1" {tmp_path}/script.sh; echo "Submitted batch job 77"',
        "srun": "exit 0",
        "squeue": "exit 0",
        "scontrol": "exit 0",
        "sacct": 'echo "JobID|State|NodeList"; echo "77|CANCELLED|n1"',
    }.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    arguments = given(config(world, tmp_path / "run", "flamingo"), tmp_path)
    command = [sys.executable, "train.py", "-m", "launch=slurm", "nodes=4", *arguments, "launch.partition=gpu"]
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    process = begin(command, tmp_path / "log", PATH=path)
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "script.sh").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    text = (tmp_path / "script.sh").read_text() if (tmp_path / "script.sh").exists() else ""
    wanted = (
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=12",
        "--partition=gpu",
        "--requeue",
        "--signal=USR2@300",
        "--time=1440",
        "--open-mode=append",
        "export SLURM_KILL_BAD_EXIT=1",
    )
    missing = [option for option in wanted if option not in text]
    assert not missing, (missing, text, (tmp_path / "log").read_text()[-2000:])
    assert subprocess.run(["bash", "-n", str(tmp_path / "script.sh")]).returncode == 0
