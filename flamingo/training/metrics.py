"""What a run says about itself: `metrics.jsonl`, TensorBoard, and a progress line with the time left."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

QUIET_SECONDS = 10.0
"""Without a terminal a line is printed at most this often."""


class JsonLines:
    """`metrics.jsonl`: one object a logged step, flushed at once; a resumed run drops what lies beyond its step."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Opens `path` for appending after removing every line whose `step` is above `resume_step`."""
        kept = []
        if path.exists():
            lines = path.read_text().splitlines()
            # A killed run can leave half a line at the end; it belongs to a step that is done again.
            kept = [line for line in lines if _step_of(line) is not None and (_step_of(line) or 0) <= resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(path)
        self._file: IO[str] = path.open("a")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Appends one line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return None


class TensorBoard:
    """The same values for TensorBoard."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        """Continues the event files in `folder`, hiding what an interrupted run wrote beyond `resume_step`."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Adds one scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


class ProgressLine:
    """A bar in a terminal; elsewhere (a log file, CI) a plain line now and then. Both say how much time is left."""

    def __init__(self, title: str, total: int, start: int) -> None:
        """`start` of `total` steps are already done."""
        self._title, self._total, self._start = title, total, start
        self._began = self._printed = time.monotonic()
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
            )
            self._task = self._bar.add_task(title, total=total, completed=start, note="")
            self._bar.start()

    def update(self, step: int, note: str) -> None:
        """`step` steps are done; `note` is shown beside them."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
            return
        now = time.monotonic()
        if now - self._printed >= QUIET_SECONDS or step == self._total:
            left = (now - self._began) / max(1, step - self._start) * (self._total - step)
            print(
                f"{self._title}  {step}/{self._total}  {note}  {_clock(left)} left",
                file=sys.stderr,
                flush=True,
            )
            self._printed = now

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
