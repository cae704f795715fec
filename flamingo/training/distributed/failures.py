"""What happens when a process of several fails, or when nothing happens at all.

The process that fails says who it is, leaves its reason in the store that brought the processes together, and ends. A
thread of every other process looks there every two seconds and ends its own process: a collective that waits for one
that is gone would otherwise hold it for minutes. Under torchrun the error also goes into its report.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from flamingo.errors import UserError
from flamingo.training.distributed.fsdp import Processes, leave
from flamingo.training.distributed.signals import Stopped

T = TypeVar("T")
KEY = f"flamingo/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
LOOK_SECONDS = 2.0
LINGER_SECONDS = 3 * LOOK_SECONDS
"""How long a process that failed stays: the first one may be keeping the store that the others look into."""


class Failed(Exception):  # noqa: N818
    """An error of one process of several, with who it was in front."""


class Watch:
    """Looks out for failures of other processes, from its start to its `close`."""

    def __init__(self, processes: Processes) -> None:
        """A single process has nobody to look out for."""
        self._me = f"process {processes.rank} of {processes.size} (host {socket.gethostname()}, pid {os.getpid()})"
        self._closed = threading.Event()
        self._store: Any = None
        self._thread: threading.Thread | None = None
        if processes.size > 1:
            self._store = _get_default_store()
            # A connection of its own: this one may be held by a process group that waits.
            self._thread = threading.Thread(target=self._look, args=(self._store.clone(),), daemon=True)
            self._thread.start()

    def _look(self, store: Any) -> None:
        lost = 0
        while not self._closed.wait(LOOK_SECONDS):
            try:
                found = store.get(KEY).decode() if store.check([KEY]) else ""
                lost = 0
            except RuntimeError:  # the process that keeps the store may just be leaving
                lost += 1
                found = "the process that keeps the store is gone" if lost == 3 else ""
            if found and not self._closed.wait(LOOK_SECONDS):  # this process may be about to tell the same
                print(f"{self._me} stops, because {found}", file=sys.stderr, flush=True)
                os._exit(1)

    def failed(self, error: BaseException) -> None:
        """Tells the others, unless one of them was first."""
        self._closed.set()  # or this process would stop at its own words
        if self._store is None:
            return
        reason = " ".join(f"{self._me} failed: {type(error).__name__}: {error}".split())[:500]
        try:
            self._store.compare_set(KEY, "", reason)
        except RuntimeError:
            return  # the store is gone, and with it whoever could read it
        time.sleep(LINGER_SECONDS)

    def close(self) -> None:
        """Stops looking."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=LINGER_SECONDS)


def watched(processes: Processes, work: Callable[[], T]) -> T:
    """`work()`; when it fails the other processes hear of it and stop."""
    watch = Watch(processes)
    try:
        return work()
    except Stopped:
        raise
    except Exception as error:
        if processes.size == 1:
            raise
        who = f"process {processes.rank} of {processes.size} on {socket.gethostname()}"
        # Said before the others are told: they end this process's group when they hear of it.
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


def submitted(work: Callable[[], Any]) -> None:
    """Runs a job; one that submitit runs is queued again when submitit's own signal has stopped it."""
    try:
        work()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            atexit.register(leave, 0)  # submitit ends the interpreter, which may abort in gloo's threads
    except Stopped as stop:
        if not stop.hand_on():
            raise
        print(stop, file=sys.stderr, flush=True)


def exit_status(work: Callable[[], Any]) -> int:
    """Runs a command: its exit status, after a mistake of the user or a stop has been told in one line."""
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        if int(os.environ.get("RANK", "0")) == 0:
            print(stop, file=sys.stderr)
        return stop.status
    except Failed as failure:  # told already
        return 2 if isinstance(failure.__cause__, UserError) else 1
    return 0


class Stall:
    """When no update ends for some minutes, prints where every thread of this process is, again and again."""

    def __init__(self, minutes: float) -> None:
        """0: never."""
        self._seconds = 60.0 * minutes

    def moved(self) -> None:
        """An update has ended, or something else that may take long has."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=sys.__stderr__ or sys.stderr)

    @staticmethod
    def close() -> None:
        """Says nothing any more."""
        faulthandler.cancel_dump_traceback_later()
