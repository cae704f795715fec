"""How a run ends before its last update: it is asked to stop, a process fails, or it makes no progress.

Asked to stop: SLURM sends SIGTERM, or the signal that the job asked for (SIGUSR1, submitit: SIGUSR2), some time before
it takes the machine away; Ctrl-C is SIGINT. The handler only notes the signal. The loop adds the note of every process
to the sum it makes at each update anyway, so that all processes stop after the same update, whichever was signalled.
A thread hears of the signal too: a process that waits in a collective for one that hangs runs no handler, and must
still be gone when its grace period is over.

A failure: the process that fails prints who it is, leaves its reason in the store that brought the processes together,
and ends. A thread of every other process looks there every two seconds and ends its own process, which would otherwise
wait for minutes in a collective for one that is gone. Under torchrun the error also goes into its report.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, TypeVar

from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from flamingo.errors import UserError
from flamingo.training.distributed.fsdp import Processes, alive_key, exit_process

T = TypeVar("T")
KEY = f"flamingo/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
LOOK_SECONDS = 2.0
LINGER_SECONDS = 3 * LOOK_SECONDS
"""How long a process that failed stays: the first one may be keeping the store that the others look into."""
AGAIN_SECONDS = 1.0
"""A second Ctrl-C within this time is the first one, handed on by torchrun."""
WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Stopped(Exception):  # noqa: N818
    """The run was asked to stop and has saved itself. `signum` is 0 where another process was signalled."""

    def __init__(self, message: str, signum: int, previous: Any) -> None:
        super().__init__(message)
        self.signum, self._previous = signum, previous

    @property
    def status(self) -> int:
        """Exit status: 128 + signal, as a shell reports it."""
        return 128 + (self.signum or signal.SIGTERM)

    def hand_on(self) -> bool:
        """Call the handler that was installed for SIGUSR2 before ours, if any: submitit's, which queues the job again.

        A job that SLURM itself takes away (SIGTERM) is queued again by SLURM.
        """
        if not callable(self._previous):
            return False
        if self.signum != signal.SIGTERM:
            self._previous(signal.SIGUSR2, None)
        return True


class StopSignals:
    """A record of signals until it is closed; a second Ctrl-C stops at once."""

    def __init__(self, grace_seconds: float) -> None:
        """Install the handlers; in a thread other than the main one nothing can be installed."""
        self.signum = 0
        self._at, self._pid = 0.0, os.getpid()
        self._grace = grace_seconds
        self._timer: threading.Timer | None = None
        self._lock = threading.RLock()
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._wakeup: tuple[int, socket.socket] | None = None
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._note) for signum in WATCHED}
            heard, told = socket.socketpair()
            told.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False), told
            threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True).start()

    def _listen(self, heard: socket.socket) -> None:
        """Begin the grace period of signals whose handler cannot run, until `close`."""
        with heard:
            while numbers := heard.recv(64):
                for signum in numbers:
                    if signum in WATCHED:
                        self._begin(signum)

    def _begin(self, signum: int) -> None:
        """Start the grace period with the first signal."""
        with self._lock:  # of both the handler and the thread
            if not self.signum and self._before:
                self._at = time.monotonic()
                self._timer = threading.Timer(self._grace, self._too_late)
                self._timer.daemon = True
                self._timer.start()
                self.signum = signum

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a loader's worker, which has inherited this handler: the process that it serves ends it
        if signum == signal.SIGINT and self.signum == signal.SIGINT and time.monotonic() - self._at > AGAIN_SECONDS:
            raise KeyboardInterrupt
        self._begin(signum)

    def _too_late(self) -> None:
        print(
            f"error: the current update and its checkpoint did not finish within {self._grace:g} s of "
            f"{signal.Signals(self.signum).name}: the run ends at its last checkpoint; "
            "raise run.checkpoint.grace_seconds and the scheduler's notice period, or save more often",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + self.signum)

    def stopped(self, saved: str) -> Stopped:
        """Return the exception that ends the run, once it is saved."""
        name = signal.Signals(self.signum).name if self.signum else "a signal to another process"
        return Stopped(
            f"stopped by {name}, {saved}: the same command resumes from there",
            self.signum,
            self._before.get(signal.SIGUSR2),
        )

    def close(self) -> None:
        """Restore the earlier handlers."""
        if self._timer is not None:
            self._timer.cancel()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}
        if self._wakeup is not None:
            (before, told), self._wakeup = self._wakeup, None
            signal.set_wakeup_fd(before)
            told.close()  # which ends the thread


def _forget_wakeup() -> None:
    """Keep a forked worker's signals from being heard as its parent's."""
    with suppress(ValueError):  # forked by another thread than the main one
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_wakeup)


class Failed(Exception):  # noqa: N818
    """An error of one process of several; the message begins with which one."""


class FailureWatch:
    """A watch for failures of other processes, until it is closed."""

    def __init__(self, processes: Processes) -> None:
        """Start watching; a single process has nothing to watch."""
        self._me = f"process {processes.rank} of {processes.size} (host {socket.gethostname()}, pid {os.getpid()})"
        self._closed = threading.Event()
        self._store: Any = None
        self._thread: threading.Thread | None = None
        self._rank = processes.rank
        if processes.size > 1:
            self._store = _get_default_store()
            # A connection of its own: this one may be held by a process group that waits.
            self._thread = threading.Thread(target=self._look, args=(self._store.clone(),), daemon=True)
            self._thread.start()

    def _look(self, store: Any) -> None:
        lost = beats = 0
        while not self._closed.wait(LOOK_SECONDS):
            try:
                store.set(alive_key(self._rank), str(beats := beats + 1))
                reason = store.get(KEY).decode() if store.check([KEY]) else ""
                lost = 0
            except RuntimeError:  # the process that keeps the store may just be leaving
                lost += 1
                reason = "the process that keeps the store is gone" if lost == 3 else ""
            if reason and not self._closed.wait(LOOK_SECONDS):  # this process may be about to report the same
                print(f"{self._me} stops because {reason}", file=sys.stderr, flush=True)
                os._exit(1)

    def failed(self, error: BaseException) -> None:
        """Report the reason to the other processes, unless one of them was first."""
        self._closed.set()  # or this process would stop at its own report
        if self._store is None:
            return
        reason = " ".join(f"{self._me} failed: {type(error).__name__}: {error}".split())[:500]
        try:
            self._store.compare_set(KEY, "", reason)
        except RuntimeError:
            return  # the store is gone, and with it whoever could read it
        time.sleep(LINGER_SECONDS)

    def close(self) -> None:
        """Stop looking."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=LINGER_SECONDS)


def report_failure(processes: Processes, work: Callable[[], T]) -> T:
    """Return `work()`; when it fails, print why and stop the other processes."""
    watch = FailureWatch(processes)
    try:
        return work()
    except Stopped:
        raise
    except Exception as error:
        if processes.size == 1:
            raise
        who = f"process {processes.rank} of {processes.size} on {socket.gethostname()}"
        # Printed before the others know: they end this process's group when they hear of it.
        if isinstance(error, UserError):
            print(f"error: {error} ({who})", file=sys.stderr, flush=True)
        else:
            print(f"{who} failed:\n{''.join(traceback.format_exception(error))}", file=sys.stderr, flush=True)
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):
            get_error_handler().record_exception(error)
        watch.failed(error)
        raise Failed(str(error)) from error
    finally:
        watch.close()


def run_submitted(work: Callable[[], Any]) -> None:
    """Run a job; one that submitit runs is queued again when submitit's own signal has stopped it."""
    try:
        work()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            atexit.register(exit_process, 0)  # submitit ends the interpreter, which may abort in gloo's threads
    except Stopped as stop:
        if not stop.hand_on():
            raise
        print(stop, file=sys.stderr, flush=True)


def exit_status(work: Callable[[], Any]) -> int:
    """Run a command; return its exit status, after printing a user's mistake or a stop as one line."""
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        if int(os.environ.get("RANK", "0")) == 0:
            print(stop, file=sys.stderr)
        return stop.status
    except Failed as failure:  # printed already
        return 2 if isinstance(failure.__cause__, UserError) else 1
    return 0


class StallReporter:
    """A timer that prints where every thread of this process is, repeatedly, when no update ends for some minutes."""

    def __init__(self, minutes: float) -> None:
        """0: never."""
        self._seconds = 60.0 * minutes

    def restart_clock(self) -> None:
        """Start waiting again: an update has ended, or something else that may take long."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=sys.__stderr__ or sys.stderr)

    @staticmethod
    def close() -> None:
        """Stop printing."""
        faulthandler.cancel_dump_traceback_later()
