"""What can happen to a run beside a kill at a random moment: chosen moments, a second start, damage while it is down.

Part of `python -m tests.training.campaign`. Each adversity has one of two right ends: the run becomes the one that
nobody disturbed, bit for bit, and says what it did without; or it stops with one sentence and changes nothing.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import train as recipe
from flamingo.training import run_folder
from flamingo.training.checkpoints import store
from flamingo.training.checkpoints.integrity import CHECKSUMS, MARKER
from flamingo.training.config import TrainConfig

Damage = Callable[[Path, random.Random], None]
"""Harms a run folder that has whole checkpoints and is not running."""


def newest(run_dir: Path) -> Path:
    return store.step_folders(run_dir / "checkpoints")[-1][1]


def _flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def flip_tensors(run_dir: Path, rng: random.Random) -> None:
    _flip(rng.choice(sorted(newest(run_dir).glob("*.distcp"))), rng)


def flip_metadata(run_dir: Path, rng: random.Random) -> None:
    _flip(newest(run_dir) / MARKER, rng)


def cut_metadata(run_dir: Path, rng: random.Random) -> None:
    file = newest(run_dir) / MARKER
    os.truncate(file, rng.randrange(file.stat().st_size))


def zero_tensors(run_dir: Path, rng: random.Random) -> None:
    """What a machine that loses its power may leave of a file: its length."""
    file = rng.choice(sorted(newest(run_dir).glob("*.distcp")))
    file.write_bytes(bytes(file.stat().st_size))


def lose_file(run_dir: Path, rng: random.Random) -> None:
    rng.choice(sorted(newest(run_dir).glob("*.distcp"))).unlink()


def lose_checksums(run_dir: Path, rng: random.Random) -> None:
    (newest(run_dir) / CHECKSUMS).unlink()


def lose_newest_marker(run_dir: Path, rng: random.Random) -> None:
    (newest(run_dir) / MARKER).unlink()


def mix_steps(run_dir: Path, rng: random.Random) -> None:
    (_, older), (_, newer) = store.step_folders(run_dir / "checkpoints")[-2:]
    file = sorted(older.glob("*.distcp"))[-1]
    shutil.copy(file, newer / file.name)


def lose_markers(run_dir: Path, rng: random.Random) -> None:
    """A copy without hidden files."""
    for _, folder in store.step_folders(run_dir / "checkpoints"):
        (folder / MARKER).unlink()


def cut_all(run_dir: Path, rng: random.Random) -> None:
    for _, folder in store.step_folders(run_dir / "checkpoints"):
        for file in folder.glob("*.distcp"):
            os.truncate(file, file.stat().st_size - rng.randint(1, 4096))


def lose_checkpoints(run_dir: Path, rng: random.Random) -> None:
    shutil.rmtree(run_dir / "checkpoints")


def make_unreadable(run_dir: Path, rng: random.Random) -> None:
    """A link to itself: every look fails with an error that is not "no such file"."""
    (run_dir / "checkpoints").rename(run_dir / "elsewhere")
    (run_dir / "checkpoints").symlink_to("checkpoints")


OLDER_IS_USED: dict[str, Damage] = {
    "a bit of the tensors flipped": flip_tensors,
    "a bit of .metadata flipped": flip_metadata,
    ".metadata cut": cut_metadata,
    "tensors zeroed": zero_tensors,
    "a file of tensors gone": lose_file,
    "checksums gone": lose_checksums,
    ".metadata gone": lose_newest_marker,
    "a file of an older step": mix_steps,
}
IS_REFUSED: dict[str, Damage] = {
    "copied without hidden files": lose_markers,
    "all checkpoints cut": cut_all,
    "checkpoints gone": lose_checkpoints,
    "checkpoints unreadable": make_unreadable,
}


def at_call(owner: Any, name: str, moment: Path, when: Callable[..., bool] = lambda *given: True) -> Callable[[], None]:
    """Return what a fork does before it trains: `owner.name` waits, once, until it is killed, after saying so."""

    def prepare() -> None:
        plain = getattr(owner, name)

        def held(*given: Any, **options: Any) -> Any:
            if not moment.exists() and when(*given):
                moment.write_text(name)
                time.sleep(60)
            return plain(*given, **options)

        setattr(owner, name, held)

    return prepare


def moments(moment: Path) -> dict[str, Callable[[], None]]:
    """Return the moments at which a run is killed, each as what brings a fork to it."""
    updates = iter(range(10**6))
    return {
        "while the model is loaded": at_call(recipe.protocol, "parallelize", moment),
        "in the first update": at_call(torch.optim.AdamW, "step", moment),
        "between an update and its figures": at_call(
            recipe.sinks.MetricSinks, "log", moment, lambda *given: next(updates) == 6
        ),
        "before the marker gets its name": at_call(
            Path, "rename", moment, lambda path, target: Path(target).name == MARKER and "00000004" in str(target)
        ),
        "between checksums and marker": at_call(
            Path, "replace", moment, lambda path, target: Path(target).name == CHECKSUMS and "00000006" in str(target)
        ),
        "while an old checkpoint is removed": at_call(
            shutil, "rmtree", moment, lambda path, *rest: "step-0000" in str(path)
        ),
        "while metrics are rewritten": at_call(
            Path, "replace", moment, lambda path, target: Path(target).name == "metrics.jsonl"
        ),
        "while the model is written": at_call(run_folder, "export", moment),
        "before the model gets its name": at_call(
            Path, "replace", moment, lambda path, target: Path(target).name == "model"
        ),
        "while the plot is drawn": at_call(run_folder, "draw_losses", moment),
    }


@dataclass
class Count:
    """What became of the runs that met one adversity."""

    runs: int = 0
    same: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)


def table(counts: dict[str, Count]) -> str:
    """Return all adversities as Markdown, and what was wrong in words."""
    lines = [("adversity", "runs", "as undisturbed", "refused, untouched", "wrong"), ("---",) * 5]
    for name, count in counts.items():
        lines.append((name, *map(str, (count.runs, count.same, count.refused, len(count.wrong)))))  # type: ignore[arg-type]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([text, *(f"WRONG {name}: {said}" for name, count in counts.items() for said in count.wrong)])


def shorter(made: TrainConfig, steps: int) -> TrainConfig:
    """Return the config for a run that ends early."""
    made.run.steps = steps
    return made


def snapshot(run_dir: Path) -> dict[str, bytes]:
    """Return every file that must stay as it is when a start is refused."""
    return {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }


STOP, CONTINUE, KILL = signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL
