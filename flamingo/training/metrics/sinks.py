"""Where a run's figures go: `metrics.jsonl`, the console, and TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import yaml
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from flamingo.errors import UserError
from flamingo.files import write_atomically
from flamingo.training.config import TrainConfig


class Sink(Protocol):
    """What takes the figures of a step."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take one step's figures."""

    def close(self) -> None:
        """End: the run is over, for now."""


class JsonLines:
    """`metrics.jsonl`: one object a logged step, flushed at once; a resumed run drops what lies beyond its step.

    It does so with its first line: a start that fails before that leaves the file as it was.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Append to `path`, once every line whose `step` is above `resume_step` is removed."""
        self._path, self._resume_step = path, resume_step
        self._file: IO[str] | None = None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line."""
        self._file = self._file or self._opened()
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def _opened(self) -> IO[str]:
        kept = []
        if self._path.exists():
            lines = self._path.read_text(errors="replace").splitlines()
            # A killed run can leave half a line at the end; it belongs to a step that is done again.
            kept = [line for line in lines if (step := _step_of(line)) is not None and step <= self._resume_step]
        write_atomically(self._path, "".join(line + "\n" for line in kept))
        return self._path.open("a")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return None


def last_step(path: Path) -> int:
    """Return the highest step that has figures in a `metrics.jsonl`; 0: none."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return max((step for line in lines if (step := _step_of(line)) is not None), default=0)


class TensorBoard:
    """The same values for TensorBoard."""

    def __init__(self, folder: Path, *, resume_step: int, config: Mapping[str, Any] | None = None) -> None:
        """Continue the event files in `folder`, hiding what an interrupted run wrote beyond `resume_step`.

        `config` is shown as text.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=resume_step + 1)
        if config:
            text = yaml.safe_dump(plain(config), sort_keys=False)
            self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), resume_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add one scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandB:
    """Weights & Biases. A resumed run continues under its id; WANDB_MODE=offline writes below the run folder only."""

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any] | None = None) -> None:
        """Start or resume the run's own id, which is kept beside its figures; `config` is the run's."""
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ.setdefault(name, str(run_dir.absolute() / "wandb"))  # else in the home folder
        import wandb

        file = run_dir / "wandb-id.txt"
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:12])
        self._run: Any = wandb.init(
            project=project,
            name=run_name(run_dir),
            id=file.read_text().strip(),
            resume="allow",
            dir=str(run_dir),
            config=plain(config or {}),
            # A continuation may have more steps; wandb refuses other values for a key it knows, unless allowed.
            allow_val_change=True,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send one step's figures; its server refuses those of steps that it received before a kill."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Wait until everything is sent or written."""
        self._run.finish()


QUIET_SECONDS = 10.0
"""Without a terminal a line is printed at most this often."""


class ProgressLine:
    """A bar in a terminal; elsewhere (a log file, CI) a plain line now and then. Both say how much time is left.

    That is counted from the first step they are shown on: what is before it warms up, compiles and starts workers.
    """

    def __init__(self, title: str, total: int, start: int) -> None:
        """Begin at `start` of `total` steps."""
        self._title, self._total = title, total
        self._printed = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                speed_estimate_period=600.0,  # of rich's own 30 s no two steps may be left
            )
            self._task = self._bar.add_task(title, total=total, completed=start, note="")
            self._bar.start()

    def update(self, step: int, note: str) -> None:
        """Show that `step` steps are done, with `note` beside them."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
            return
        now = time.monotonic()
        first, since = self._first = self._first or (step, now)
        if now - self._printed >= QUIET_SECONDS or step == self._total:
            seconds = (now - since) / max(1, step - first) * (self._total - step)
            left = f"  {_clock(seconds)} left" if step > first or step == self._total else ""
            print(f"{self._title}  {step}/{self._total}  {note}{left}", file=sys.stderr, flush=True)
            self._printed = now

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def run_name(run_dir: Path) -> str:
    """Return what a run is called elsewhere: its folder, for a job of a sweep with that of the sweep before it.

    >>> run_name(Path("runs/mine")), run_name(Path("runs/mine/run.seed=1"))
    ('mine', 'mine/run.seed=1')
    """
    run_dir = run_dir.absolute()
    return "/".join(run_dir.parts[-2:]) if "=" in run_dir.name else run_dir.name


def plain(value: Any) -> Any:
    """Return nested tables and lists of plain values, as YAML and JSON have them."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def start_wandb(project: str, run_dir: Path, config: Mapping[str, Any] | None = None) -> WandB:
    """Connect to Weights & Biases now, not at the first figures.

    Raises:
        UserError: nobody is logged in, or its server does not answer or refuses.
    """
    try:
        return WandB(project, run_dir, config)
    except OSError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(
            f"run.wandb={project} cannot start ({why}): run wandb login, set WANDB_MODE=offline, or set run.wandb=null"
        ) from error


class MetricSinks:
    """All sinks of the first process; on the others nothing happens."""

    def __init__(self, run_dir: Path, config: TrainConfig, *, start: int, is_main: bool) -> None:
        """Drop figures beyond `start`, which an interrupted run has left.

        Services are shown the whole config; the first process alone makes the sinks.

        Raises:
            UserError: the run folder cannot be written, or Weights & Biases does not start.
        """
        self._sinks: list[Sink] = []
        self._progress: ProgressLine | None = None
        if not is_main:
            return
        options, described = config.run, config.as_dict()
        try:
            self._figures: JsonLines = JsonLines(run_dir / "metrics.jsonl", resume_step=start)
            if options.tensorboard:
                self._sinks.append(TensorBoard(run_dir / "tensorboard", resume_step=start, config=described))
            if options.wandb:
                self._sinks.append(start_wandb(options.wandb, run_dir, described))
        except OSError as error:
            raise UserError(f"{run_dir} cannot be written ({error}): free space or choose another run.dir") from error
        self._progress = ProgressLine(config.objective, options.steps, start)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send one step's figures to all sinks; one that fails, other than the first, is reported once and dropped.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        if self._progress is None:
            return
        try:
            self._figures.log(step, values)
        except OSError as error:
            raise _unwritten(error) from error
        for sink in list(self._sinks):
            try:
                sink.log(step, values)
            except Exception as error:  # another service's outage must not end a run
                self._sinks.remove(sink)
                print(f"{type(sink).__name__} failed and gets no more figures: {error}", file=sys.stderr, flush=True)
        if "loss" in values:
            self._progress.update(step, f"loss {values['loss']:.3f}")

    def close(self) -> None:
        """Close all; closing again does nothing.

        Raises:
            UserError: metrics.jsonl cannot be written; what is buffered of it is, at the latest, here.
        """
        if self._progress is not None:
            self._progress.close()
            self._progress = None
            for sink in self._sinks:
                try:
                    sink.close()
                except Exception as error:  # as in `log`
                    print(f"{type(sink).__name__} may lack its last figures: {error}", file=sys.stderr, flush=True)
            try:
                self._figures.close()
            except OSError as error:
                raise _unwritten(error) from error


def _unwritten(error: OSError) -> UserError:
    return UserError(f"metrics.jsonl cannot be written ({error}): free space or choose another run.dir")
