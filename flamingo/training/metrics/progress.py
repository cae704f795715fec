"""A progress line with the time left."""

from __future__ import annotations

import sys
import time

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
