"""Kills training runs at random moments and compares what they become with a run that nobody killed.

    python -m tests.training.campaign --runs 50 --adverse 2

Each run is killed up to three times with SIGKILL, all its processes or one of them, at a random moment or, every other
time, as soon as a checkpoint is being written; then it is started once more and let go to its end. Its losses must be
those of the uninterrupted run: bit for bit where all its starts had the same number of processes, within 1e-5 where it
went from one to two processes or from two to one. Every start must go on from the newest checkpoint that has its
marker, and say so; what a kill left half-written must never be that. The processes are forks of this one, so that the
50 runs take minutes. A run that was killed only before its first update counts as one that went on from nothing.

`--adverse N` also does, N times each, what `tests.training.adversities` lists: a kill at a chosen moment, a second
start into the same folder, and damage to the checkpoints of a run that is down.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt  # noqa: F401 - here, and not again in every fork
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp

from flamingo.training.checkpoints import store
from flamingo.training.config import TrainConfig
from tests.training.adversities import (
    CONTINUE,
    IS_REFUSED,
    KILL,
    OLDER_IS_USED,
    STOP,
    Count,
    Damage,
    moments,
    shorter,
    snapshot,
)
from tests.training.adversities import table as adverse_table
from tests.training.tally import Row, table
from tests.training.world import config, write_world
from train import train

STEPS, EVERY = 16, 2


def settings(world: Path, run_dir: Path) -> TrainConfig:
    """A run with checkpoints in the background, some of which stay."""
    made = config(world, run_dir, "flamingo", steps=STEPS, checkpoint_every=EVERY, keep_last=2, ema=0.5)
    made.run.checkpoint.keep_every = 4 * EVERY
    for dataset in made.data.datasets.values():
        dataset["batch_size"] //= 2
    return made


def start(made: TrainConfig, processes: int, log: Path, before: Callable[[], None] | None = None) -> list[int]:
    """The run in `processes` forks, each of which calls `before` first; their process ids."""
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
                if before is not None:
                    before()
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


def writing(run_dir: Path, since: float) -> bool:
    """Whether a checkpoint was begun after `since` and is not whole; older ones are what a kill has left."""
    for _, folder in store.step_folders(run_dir / "checkpoints", complete=False):
        with suppress(FileNotFoundError):  # it has just been removed
            if folder.stat().st_mtime >= since:
                return True
    return False


def newest(run_dir: Path) -> int:
    """Update of the newest checkpoint that has its marker; 0: there is none."""
    return max((step for step, _ in store.step_folders(run_dir / "checkpoints")), default=0)


@dataclass
class Attempt:
    """One start of a run."""

    run_dir: Path
    log: Path
    forks: list[int]
    since: float
    expected: int
    """Update of the checkpoint that it must go on from."""
    told: int
    """Length of the log before it."""

    @classmethod
    def begin(cls, made: TrainConfig, processes: int, log: Path) -> Attempt:
        """Starts the processes."""
        run_dir = Path(made.run.dir)
        told = log.stat().st_size if log.exists() else 0
        since, expected = time.time(), newest(run_dir)
        return cls(run_dir, log, start(made, processes, log), since, expected, told)

    def said(self) -> str:
        """What its processes have printed."""
        return self.log.read_bytes()[self.told :].decode(errors="replace")

    def check(self, row: Row) -> None:
        """Notes what it went on from, if it came so far."""
        text = self.said()
        if "process(es) on" not in text:
            return
        found = re.search(r"resumed \S*step-(\d{8})", text)
        step = int(found[1]) if found else 0
        row.resumed[step] += 1
        if step != self.expected:
            row.wrong.append(f"{self.run_dir.name}: went on from {step}, the newest whole one was {self.expected}")


def kill(attempt: Attempt, rng: random.Random, row: Row) -> None:
    """SIGKILL at a random moment, or inside a save; whoever is left must end by itself within a minute.

    The moment is an update between those that are left, and some time after it; once in eight it is while the run
    still begins. A clock would miss on a machine that is busy with other things.
    """
    forks, run_dir, since = attempt.forks, attempt.run_dir, attempt.since
    figures = run_dir / "metrics.jsonl"
    early, in_save = rng.random() < 0.125, rng.random() < 0.6
    update, seconds = rng.randint(attempt.expected, max(attempt.expected, STEPS - 2)), rng.uniform(0, 0.1)
    began = time.monotonic()
    deadline = began + (rng.uniform(0, 2) if early else 240)
    while time.monotonic() < deadline and any(alive(pid) for pid in forks):
        found = lines(run_dir) if figures.exists() and figures.stat().st_mtime > since else []
        if found and found[-1]["step"] >= update and (not in_save or writing(run_dir, since)):
            time.sleep(rng.uniform(0, 0.03) if in_save else seconds)
            break
        time.sleep(0.001)
    # One alone only when they have met: before that the other waits for it, and to end it is the launcher's work.
    met = figures.exists() and figures.stat().st_mtime > since
    victims = [rng.choice(forks)] if len(forks) > 1 and met and rng.random() < 0.5 else forks
    inside = writing(run_dir, since)
    for pid in victims:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    statuses = finish(forks)
    if -signal.SIGKILL in statuses:
        row.kills += 1
        row.inside += inside
        row.half_written += writing(run_dir, since)
        if len(victims) < len(forks):
            row.one += 1
            if time.monotonic() - began > 60:
                row.wrong.append(f"{run_dir.name}: the other process went on for {time.monotonic() - began:.0f} s")
    elif any(statuses):
        row.wrong.append(f"{run_dir.name}: ended by itself with {statuses}: {attempt.said()[-600:]}")
    attempt.check(row)


def alive(pid: int) -> bool:
    """Whether the process has not ended."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


LAYOUTS = ((1, 1), (2, 2), (1, 1), (2, 2), (1, 2), (2, 1))
"""Processes of the first start and of the last one, which the runs have in turn; starts between have either."""


def campaign(root: Path, runs: int, seed: int) -> dict[tuple[int, int], Row]:
    """All runs; what was found wrong is in the rows."""
    torch.set_num_threads(1)
    world, rng = write_world(root / "world"), random.Random(seed)
    rows: dict[tuple[int, int], Row] = {layout: Row() for layout in LAYOUTS[: max(1, runs)]}
    whole: dict[int, list[dict[str, float]]] = {}
    for processes in (1, 2):
        run_dir = root / f"whole-{processes}"
        if any(finish(start(settings(world, run_dir), processes, root / "log.txt"))):
            raise SystemExit((root / "log.txt").read_text()[-3000:])
        whole[processes] = lines(run_dir)
    for number in range(runs):
        layout = LAYOUTS[number % len(LAYOUTS)]
        row, run_dir, log = rows[layout], root / f"run-{number:03d}", root / f"run-{number:03d}.log"
        made = settings(world, run_dir)
        row.runs += 1
        processes = layout[0]
        for _ in range(rng.randint(1, 3)):
            kill(Attempt.begin(made, processes, log), rng, row)
            processes = rng.choice(layout)
        last = Attempt.begin(made, layout[1], log)
        if any(finish(last.forks)):
            row.wrong.append(f"{run_dir.name}: {last.said()[-600:]}")
            continue
        last.check(row)
        compare(run_dir, whole[layout[0]], layout[0] == layout[1], row)
        print(f"run {number + 1}/{runs}, {layout[0]} -> {layout[1]}: {row}", flush=True)
        shutil.rmtree(run_dir)
    return rows


@dataclass
class Adverse:
    """Runs that meet adversities, beside the run that met none."""

    root: Path
    world: Path
    whole: list[dict[str, float]]
    rng: random.Random
    counts: dict[str, Count] = field(default_factory=dict)

    def all(self) -> None:
        """Meet each once."""
        for name, before in moments(self.root / "moment").items():
            self.killed_at(name, before)
        self.started_twice()
        stopped = self.root / "stopped"
        shutil.rmtree(stopped, ignore_errors=True)
        finish(start(shorter(settings(self.world, stopped), STEPS // 2), 1, self.root / "stopped.log"))
        shutil.rmtree(stopped / "model")
        shutil.rmtree(stopped / "model-ema")
        for name, damage in OLDER_IS_USED.items():
            self.damaged(name, damage, stopped, refused=False)
        for name, damage in IS_REFUSED.items():
            self.damaged(name, damage, stopped, refused=True)

    def killed_at(self, name: str, before: Callable[[], None]) -> None:
        """SIGKILL at a chosen moment; the same command goes on."""
        made, log, count = self._begin(name)
        moment = self.root / "moment"
        moment.unlink(missing_ok=True)
        (pid,) = start(made, 1, log, before)
        deadline = time.monotonic() + 120
        while not moment.exists() and alive(pid) and time.monotonic() < deadline:
            time.sleep(0.005)
        if not moment.exists():
            count.wrong.append(f"the moment never came: {log.read_text()[-300:]}")
        if alive(pid):
            os.kill(pid, KILL)
        finish([pid])
        self._is_same(finish(start(made, 1, log)), Path(made.run.dir), log, count)

    def started_twice(self) -> None:
        """A second start while the first one runs, or is stopped: refused; the first one notices nothing."""
        name = "a second start in the same folder"
        made, log, count = self._begin(name)
        run_dir = Path(made.run.dir)
        (first,) = start(made, 1, log)
        update, deadline = self.rng.randint(0, STEPS // 2), time.monotonic() + 120
        while len(lines(run_dir)) <= update and alive(first) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(first, STOP)
        second = self.root / "second.log"
        second.unlink(missing_ok=True)
        (status,) = finish(start(made, 1, second))
        os.kill(first, CONTINUE)
        if status and "is in use by a training run on" in second.read_text():
            count.refused += 1
        else:
            count.wrong.append(f"the second start ended with {status}: {second.read_text()[-300:]}")
        self._is_same(finish([first]), run_dir, log, count)

    def damaged(self, name: str, damage: Damage, stopped: Path, *, refused: bool) -> None:
        """Damage while the run is down; it goes on from an older checkpoint and says so, or is refused."""
        made, log, count = self._begin(name)
        run_dir = Path(made.run.dir)
        shutil.copytree(stopped, run_dir, symlinks=True)
        damage(run_dir, self.rng)
        before = snapshot(run_dir)
        statuses = finish(start(made, 1, log))
        said = log.read_text()
        if not refused:
            if "is passed over (" not in said or "resumed" not in said:
                count.wrong.append(f"it was not said: {said[-300:]}")
            self._is_same(statuses, run_dir, log, count)
        elif statuses == [1] and said.startswith("UserError: ") and snapshot(run_dir) == before:
            count.refused += 1
        else:
            count.wrong.append(f"ended with {statuses}, the same files {snapshot(run_dir) == before}: {said[-300:]}")

    def _begin(self, name: str) -> tuple[TrainConfig, Path, Count]:
        run_dir, log = self.root / "adverse", self.root / "adverse.log"
        shutil.rmtree(run_dir, ignore_errors=True)
        log.unlink(missing_ok=True)
        count = self.counts.setdefault(name, Count())
        count.runs += 1
        return settings(self.world, run_dir), log, count

    def _is_same(self, statuses: list[int], run_dir: Path, log: Path, count: Count) -> None:
        row = Row()
        if any(statuses):
            row.wrong.append(f"ended with {statuses}: {log.read_text()[-300:]}")
        else:
            compare(run_dir, self.whole, True, row)
            if not (run_dir / "model" / "model.safetensors").exists():
                row.wrong.append("there is no model")
        count.wrong += row.wrong
        count.same += not row.wrong


def adversities(root: Path, rounds: int, seed: int) -> dict[str, Count]:
    """Every adversity in `rounds` rounds."""
    torch.set_num_threads(1)
    world = write_world(root / "world")
    whole = root / "whole"
    if any(finish(start(settings(world, whole), 1, root / "log.txt"))):
        raise SystemExit((root / "log.txt").read_text()[-3000:])
    adverse = Adverse(root, world, lines(whole), random.Random(seed))
    for number in range(rounds):
        adverse.all()
        print(f"adversities, round {number + 1}/{rounds}", flush=True)
    return adverse.counts


def compare(run_dir: Path, whole: list[dict[str, float]], same_layout: bool, row: Row) -> None:
    """Losses and gradient norms against the run that nobody killed."""
    found = lines(run_dir)
    if [line["step"] for line in found] != list(range(1, STEPS + 1)):
        row.wrong.append(f"{run_dir.name}: steps {[line['step'] for line in found]}")
        return
    away = max(abs(a["loss"] - b["loss"]) for a, b in zip(found, whole, strict=True))
    row.apart = max(row.apart, away)
    if same_layout and any(a[k] != b[k] for a, b in zip(found, whole, strict=True) for k in ("loss", "grad_norm")):
        row.wrong.append(f"{run_dir.name}: losses differ by up to {away:.2e}")
    if not same_layout and not away <= 1e-5:
        row.wrong.append(f"{run_dir.name}: losses on another layout differ by {away:.2e}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--adverse", type=int, default=0, help="rounds of all adversities")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    began = time.monotonic()
    rows: dict[tuple[int, int], Row] = {}
    counts: dict[str, Count] = {}
    if chosen.runs:
        with tempfile.TemporaryDirectory() as folder:
            rows = campaign(Path(folder), chosen.runs, chosen.seed)
        print(table(rows))
    if chosen.adverse:
        with tempfile.TemporaryDirectory() as folder:
            counts = adversities(Path(folder), chosen.adverse, chosen.seed)
        print(adverse_table(counts))
    runs = chosen.runs + sum(count.runs for count in counts.values())
    total = sum(len(wrong) for wrong in [*(row.wrong for row in rows.values()), *(c.wrong for c in counts.values())])
    print(f"{runs} runs in {time.monotonic() - began:.0f} s, {total} wrong")
    sys.exit(bool(total))


if __name__ == "__main__":
    main()
