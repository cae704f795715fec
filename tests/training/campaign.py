"""Kills training runs at random moments and compares what they become with a run that nobody killed.

    python -m tests.training.campaign --runs 50

Each run is killed up to three times with SIGKILL, all its processes or one of them, at a random moment or, every other
time, as soon as a checkpoint is being written; then it is started once more and let go to its end. Its losses must be
those of the uninterrupted run: bit for bit on the same number of processes, within 1e-5 where the last start is on the
other number. A folder without its marker must never be what a run goes on from. The processes are forks of this one, so
that the 50 runs take minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flamingo.training import state
from flamingo.training.config import TrainConfig
from tests.training.world import config, write_world
from train import train

STEPS, EVERY = 24, 3


def settings(world: Path, run_dir: Path) -> TrainConfig:
    """A run with checkpoints in the background, some of which stay."""
    made = config(world, run_dir, "flamingo", steps=STEPS, checkpoint_every=EVERY, keep_last=2, ema=0.5)
    made.run.checkpoint.keep_every = 4 * EVERY
    return made


def start(made: TrainConfig, processes: int, log: Path) -> list[int]:
    """The run in `processes` forks; their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    forks = []
    for rank in range(processes):
        if (pid := os.fork()) == 0:
            os.setsid()
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            told = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes}
            os.environ.update({key: str(value) for key, value in told.items()} if processes > 1 else {})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            status = 1
            try:
                train(made)
                status = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        forks.append(pid)
    return forks


def finish(forks: list[int], seconds: float = 240.0) -> list[int]:
    """Waits for all; their exit statuses, negative for a signal."""
    left, statuses = dict.fromkeys(forks), []
    deadline = time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del left[pid]
                statuses.append(os.waitstatus_to_exitcode(status))
        time.sleep(0.005)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        statuses.append(-99)
    return statuses


def lines(run_dir: Path) -> list[dict[str, float]]:
    """What a run has logged so far."""
    path = run_dir / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def writing(run_dir: Path) -> bool:
    """Whether a checkpoint is begun and not whole."""
    return bool(state.step_folders(run_dir / "checkpoints", complete=False))


@dataclass
class Tally:
    """What the kills have hit."""

    kills: int = 0
    in_save: int = 0
    partial_left: int = 0
    one_of_two: int = 0
    worst_other_layout: float = 0.0
    wrong: list[str] = field(default_factory=list)


def kill(forks: list[int], run_dir: Path, rng: random.Random, typical: float, tally: Tally) -> None:
    """SIGKILL at a random moment, or inside a save; whoever is left must end by itself within a minute."""
    started = time.time()
    in_save, moment = rng.random() < 0.5, time.monotonic() + rng.uniform(0.1, 1.0) * typical
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and any(alive(pid) for pid in forks):
        if writing(run_dir) if in_save and time.monotonic() > moment - 0.5 * typical else time.monotonic() > moment:
            break
        time.sleep(0.0005)
    if in_save:
        time.sleep(rng.uniform(0, 0.03))
    # One alone only when they have met: before that the other waits for it, and to end it is the launcher's work.
    figures = run_dir / "metrics.jsonl"
    met = figures.exists() and figures.stat().st_mtime > started
    victims = [rng.choice(forks)] if len(forks) > 1 and met and rng.random() < 0.5 else forks
    tally.in_save += writing(run_dir)
    for pid in victims:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    statuses = finish(forks)
    if len(victims) < len(forks):
        tally.one_of_two += 1
        if time.monotonic() - began > 60:
            tally.wrong.append(f"{run_dir.name}: the other process went on for {time.monotonic() - began:.0f} s")
    tally.kills += -signal.SIGKILL in statuses
    tally.partial_left += writing(run_dir)


def alive(pid: int) -> bool:
    """Whether the process has not ended."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def campaign(root: Path, runs: int, seed: int) -> Tally:
    """All runs; what was found wrong is in the tally."""
    torch.set_num_threads(1)
    world, rng, tally = write_world(root / "world"), random.Random(seed), Tally()
    whole: dict[int, list[dict[str, float]]] = {}
    typical: dict[int, float] = {}
    for processes in (1, 2):
        began = time.monotonic()
        run_dir = root / f"whole-{processes}"
        if any(finish(start(settings(world, run_dir), processes, root / "log.txt"))):
            raise SystemExit((root / "log.txt").read_text()[-3000:])
        typical[processes], whole[processes] = time.monotonic() - began, lines(run_dir)
    for number in range(runs):
        processes, run_dir = 1 + number % 2, root / f"run-{number:03d}"
        made, log = settings(world, run_dir), root / f"run-{number:03d}.log"
        for _ in range(rng.randint(1, 3)):
            kill(start(made, processes, log), run_dir, rng, typical[processes], tally)
        last = 3 - processes if number % 5 == 4 else processes
        if any(finish(start(made, last, log))):
            tally.wrong.append(f"{run_dir.name}: {log.read_text()[-600:]}")
            continue
        compare(run_dir, whole[processes], last == processes, tally)
        print(f"run {number + 1}/{runs}: {tally}", flush=True)
        shutil.rmtree(run_dir)
    return tally


def compare(run_dir: Path, whole: list[dict[str, float]], same_layout: bool, tally: Tally) -> None:
    """Losses and gradient norms against the run that nobody killed."""
    found = lines(run_dir)
    if [line["step"] for line in found] != list(range(1, STEPS + 1)):
        tally.wrong.append(f"{run_dir.name}: steps {[line['step'] for line in found]}")
        return
    away = max(abs(a["loss"] - b["loss"]) for a, b in zip(found, whole, strict=True))
    if same_layout and any(a[k] != b[k] for a, b in zip(found, whole, strict=True) for k in ("loss", "grad_norm")):
        tally.wrong.append(f"{run_dir.name}: losses differ by up to {away:.2e}")
    if not same_layout:
        tally.worst_other_layout = max(tally.worst_other_layout, away)
        if away > 1e-5:
            tally.wrong.append(f"{run_dir.name}: losses on another layout differ by {away:.2e}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = campaign(Path(folder), chosen.runs, chosen.seed)
    print(f"{chosen.runs} runs in {time.monotonic() - began:.0f} s: {tally}")
    sys.exit(bool(tally.wrong))


if __name__ == "__main__":
    main()
