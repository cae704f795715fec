"""When checkpoints are written, in the background, and which of them stay.

Only the copy of what trains to the CPU's memory holds training up; a thread writes it, speaking to the other processes
through a group of its own. One save is in flight at most. A save that fails is told to all processes with the next
update's sum, so that all of them stop at the same update.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from flamingo.training.checkpoints import store
from flamingo.training.checkpoints.ema import Averages
from flamingo.training.config import RunConfig
from flamingo.training.distributed.fsdp import Processes
from flamingo.training.distributed.signals import StopSignals


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        root: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        processes: Processes,
        options: RunConfig,
        averages: Averages | None = None,
    ) -> None:
        """Made by every process at the same place: it makes a process group.

        Args:
            root: folder of all checkpoints.
            model: its trained parameters are saved.
            optimizer: saved beside them.
            processes: of the run.
            options: how often, and which stay.
            averages: means of the weights, if they are kept.
        """
        self.signals = StopSignals(options.checkpoint.grace_seconds)
        self._root, self._model, self._optimizer, self._averages = root, model, optimizer, averages
        self._processes, self._options = processes, options
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._writing: tuple[Path, Future[Any]] | None = None
        self._background = options.checkpoint.background
        self._saved_step, self._saved_at = -1, time.monotonic()
        store.ignore_alone()

    def votes(self) -> list[float]:
        """For the update's sum over processes: asked to stop, time for a checkpoint, the last one failed."""
        minutes = self._options.checkpoint.minutes
        late = minutes and time.monotonic() - self._saved_at >= 60 * minutes
        failed = self._writing is not None and self._writing[1].done() and self._writing[1].exception() is not None
        return [float(self.signals.signum > 0), float(bool(late) and self._processes.is_main), float(failed)]

    def due(self, step: int, votes: list[float]) -> bool:
        """Whether a checkpoint is written after update `step`, from the summed votes; the same on every process.

        Raises:
            UserError: the save in flight has failed somewhere.
        """
        if votes[2]:
            self.finish()
        return step % self._options.checkpoint_every == 0 or votes[0] > 0 or votes[1] > 0

    def save(self, step: int, extra: dict[str, Any], *, wait: bool) -> Path:
        """Writes checkpoint `step` unless it is written; `wait` until it is whole.

        Raises:
            UserError: it cannot be written, or the one before could not.
        """
        self.finish()
        path = self._root / f"step-{step:08d}"
        if step != self._saved_step:
            store.open_folder(self._root, step)
            means = self._averages.means if self._averages else None
            content = store.trained_state(self._model, self._optimizer, extra, means)
            if wait or not self._in_background(path, content):
                try:
                    dcp.save(content, checkpoint_id=str(path), process_group=self._group)
                except store.FAILURES as error:
                    raise store.unwritable(path, error) from error
                self._whole()
            self._saved_step, self._saved_at = step, time.monotonic()
        return path

    def _in_background(self, path: Path, content: dict[str, Any]) -> bool:
        if self._background:
            try:
                future = dcp.async_save(content, checkpoint_id=str(path), process_group=self._group)
            except (AssertionError, NotImplementedError, TypeError, ValueError) as error:  # the same on all processes
                self._background = False
                print(f"checkpoints are written in the foreground ({store.why(error)})", file=sys.stderr, flush=True)
            else:
                assert isinstance(future, Future)
                self._writing = path, future
        return self._background

    def finish(self) -> None:
        """Waits for the save in flight, if any. Called by every process.

        Raises:
            UserError: it failed.
        """
        if self._writing is None:
            return
        (path, future), self._writing = self._writing, None
        try:
            future.result()
        except store.FAILURES as error:
            raise store.unwritable(path, error) from error
        self._whole()

    def _whole(self) -> None:
        if self._processes.is_main:
            with suppress(OSError):  # too many checkpoints do no harm before the disk is full, which is told
                store.prune(self._root, self._options.keep_last, self._options.checkpoint.keep_every)

    def close(self) -> None:
        """Waits for the thread, whatever comes of it, and lets go of the signals."""
        self.signals.close()
        if self._writing is not None:
            with suppress(TimeoutError):
                self._writing[1].exception(timeout=30)  # another process may be gone
