"""What every worker of this rank is doing, so that a run that hangs can say where.

A worker writes down each sample before it reads it, five integers in memory that all processes of the rank share; when
nothing arrives for long, the main process reads them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

IDLE = -1


class Board:
    """One line a worker: dataset, step, shard, row, and since when (nanoseconds of the machine's monotonic clock)."""

    def __init__(self, workers: int) -> None:
        self.lines = torch.full((max(1, workers), 5), IDLE, dtype=torch.int64).share_memory_()
        self._rows = self.lines.numpy()

    def __getstate__(self) -> torch.Tensor:
        return self.lines  # travels as a handle to the same memory

    def __setstate__(self, lines: torch.Tensor) -> None:
        self.lines, self._rows = lines, lines.numpy()

    def write(self, worker: int, dataset: int, step: int, shard: int, row: int) -> None:
        """This worker begins to read this sample."""
        self._rows[worker] = (dataset, step, shard, row, time.monotonic_ns())

    def clear(self, worker: int) -> None:
        """This worker is done with its batch."""
        self._rows[worker, 0] = IDLE

    def report(self, rank: int, name: Callable[[int, int, int], str]) -> str:
        """Who is at what for how long; `name(dataset, shard, row)` says it in words."""
        now = time.monotonic_ns()
        busy = []
        for worker, (dataset, step, shard, row, since) in enumerate(self._rows.tolist()):
            if dataset != IDLE:
                where = name(dataset, shard, row)
                busy.append(f"worker {worker} is at step {step}, {where} for {(now - since) / 1e9:.0f} s")
        return f"rank {rank}: " + ("; ".join(busy) or "no worker is reading anything")


def warn(message: str) -> None:
    """One line on stderr, at once."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
