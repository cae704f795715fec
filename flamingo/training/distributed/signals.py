"""A signal asks for a checkpoint and the end of the run; it is heard between two updates.

SLURM sends SIGTERM, or the signal that the job asked for (SIGUSR1, submitit: SIGUSR2), some time before it takes the
machine away; Ctrl-C is SIGINT. The handler only notes the signal. The engine adds the note of every process to the sum
it makes at each update anyway, so that all processes stop after the same update, whichever of them was told.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

AGAIN_SECONDS = 1.0
"""A second Ctrl-C within this time is the first one, handed on by torchrun."""
WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Stopped(Exception):  # noqa: N818
    """The run was asked to stop and has saved itself. `signum` is 0 where another process was told."""

    def __init__(self, message: str, signum: int, previous: Any) -> None:
        super().__init__(message)
        self.signum, self._previous = signum, previous

    @property
    def status(self) -> int:
        """Exit status: 128 + signal, as a shell reports it."""
        return 128 + (self.signum or signal.SIGTERM)

    def hand_on(self) -> bool:
        """Calls the handler that was installed for SIGUSR2 before ours, if any: submitit's, which queues the job again.

        A job that SLURM itself takes away (SIGTERM) is queued again by SLURM.
        """
        if not callable(self._previous):
            return False
        if self.signum != signal.SIGTERM:
            self._previous(signal.SIGUSR2, None)
        return True


class StopSignals:
    """Notes signals from its start to its `close`. A second Ctrl-C stops at once."""

    def __init__(self, grace_seconds: float) -> None:
        """Installs the handlers; in a thread other than the main one nothing can be installed."""
        self.signum = 0
        self._at, self._pid = 0.0, os.getpid()
        self._grace = grace_seconds
        self._timer: threading.Timer | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in WATCHED}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a loader's worker, which has inherited this handler: the process that it serves ends it
        if signum == signal.SIGINT and self.signum == signal.SIGINT and time.monotonic() - self._at > AGAIN_SECONDS:
            raise KeyboardInterrupt
        if not self.signum:
            self._at = time.monotonic()
            self._timer = threading.Timer(self._grace, self._too_late)
            self._timer.daemon = True
            self._timer.start()
        self.signum = self.signum or signum

    def _too_late(self) -> None:
        print(
            f"error: the update in work and its checkpoint were not done {self._grace:g} s after "
            f"{signal.Signals(self.signum).name}: the run ends with its last checkpoint; "
            "raise run.checkpoint.grace_seconds and the time the scheduler gives, or save more often",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + self.signum)

    def stopped(self, saved: str) -> Stopped:
        """The exception that ends the run, once it is saved."""
        name = signal.Signals(self.signum).name if self.signum else "a signal to another process"
        return Stopped(
            f"stopped by {name}, {saved}: the same command goes on from there",
            self.signum,
            self._before.get(signal.SIGUSR2),
        )

    def close(self) -> None:
        """Puts the earlier handlers back."""
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
