"""What a loader's worker process does when somebody sends it a signal: nothing, unless it is its own trainer.

SLURM, torchrun and Ctrl-C signal the whole process group. The trainer notes the signal, finishes its update and saves;
for that it needs its workers, which by default would be gone at once. So here SIGTERM from anybody but the parent,
SIGINT, SIGUSR1 and SIGUSR2 do nothing. A worker ends when its parent closes it, terminates it (what torch and
multiprocessing do with one that hangs) or is no more; a thread of its own watches for that, so that a worker in a read
that hangs ends too.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
LOOK = 1.0  # seconds between two looks at whether the parent still lives
CAN_WAIT = hasattr(signal, "sigtimedwait")  # not on macOS, where workers are as torch makes them


@contextmanager
def held() -> Iterator[None]:
    """In the parent, around the start of workers: they begin with these signals held back, so there is no gap."""
    if not CAN_WAIT:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin(_worker: int = 0) -> None:
    """In a worker, before anything else: one thread for computing, and one that watches."""
    torch.set_num_threads(1)
    if not CAN_WAIT:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)  # threads and commands that start from here inherit it
    threading.Thread(target=_watch, args=(os.getppid(),), name="parent watch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        sent = signal.sigtimedwait((signal.SIGTERM,), LOOK)
        if sent is not None and sent.si_pid == parent:
            os._exit(0)
    os._exit(1)
