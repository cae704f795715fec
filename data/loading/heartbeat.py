"""What each worker of this rank is doing, so that a run that hangs can report where.

Before it reads a sample, a worker writes five integers into memory that all processes of the rank share; when nothing
arrives for long, the main process reads them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

IDLE = -1


class Heartbeat:
    """A row per worker: dataset, step, part, row, and since when (nanoseconds of the machine's monotonic clock)."""

    def __init__(self, workers: int) -> None:
        self.shared = torch.full((max(1, workers), 5), IDLE, dtype=torch.int64).share_memory_()
        self._rows = self.shared.numpy()

    def __getstate__(self) -> torch.Tensor:
        return self.shared  # pickled as a handle to the same memory

    def __setstate__(self, shared: torch.Tensor) -> None:
        self.shared, self._rows = shared, shared.numpy()

    def beat(self, worker: int, dataset: int, step: int, part: int, row: int) -> None:
        """Note that a worker begins to read a sample."""
        self._rows[worker] = (dataset, step, part, row, time.monotonic_ns())

    def idle(self, worker: int) -> None:
        """Note that a worker has finished its batch."""
        self._rows[worker, 0] = IDLE

    def report(self, rank: int, describe: Callable[[int, int, int], str]) -> str:
        """Return what each worker is reading and for how long; `describe(dataset, part, row)` names a sample."""
        now = time.monotonic_ns()
        busy = []
        for worker, (dataset, step, part, row, since) in enumerate(self._rows.tolist()):
            if dataset != IDLE:
                sample = describe(dataset, part, row)
                busy.append(f"worker {worker} is at step {step}, {sample} for {(now - since) / 1e9:.0f} s")
        return f"rank {rank}: " + ("; ".join(busy) or "no worker is reading anything")


def warn(message: str) -> None:
    """Print one line on stderr, at once."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
