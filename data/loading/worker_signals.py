"""How a loader's worker process reacts to signals: it ignores them, unless its own trainer sends them.

SLURM, torchrun and Ctrl-C signal the whole process group. The trainer notes the signal, finishes its update and saves;
for that it needs its workers, which would by default be gone at once. So SIGTERM from anybody but the parent, SIGINT,
SIGUSR1 and SIGUSR2 do nothing here. A worker ends when its parent closes it, terminates it (as torch and
multiprocessing do with one that hangs) or dies; a thread watches for that, so that a worker that hangs in a read ends
too.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
LOOK = 1.0  # seconds between two checks that the parent still lives
CAN_WAIT = hasattr(signal, "sigtimedwait")  # not on macOS, where workers keep torch's behaviour


@contextmanager
def held() -> Iterator[None]:
    """Block the signals in the parent while workers start, so that they begin with them blocked and leave no gap."""
    if not CAN_WAIT:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin(_worker: int = 0) -> None:
    """Set up a worker before anything else: one thread for computing, and one that watches the parent."""
    torch.set_num_threads(1)
    if not CAN_WAIT:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)  # threads and commands started from here inherit it
    threading.Thread(target=_watch, args=(os.getppid(),), name="parent watch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        sent = signal.sigtimedwait((signal.SIGTERM,), LOOK)
        if sent is not None and sent.si_pid == parent:
            os._exit(0)
    os._exit(1)
