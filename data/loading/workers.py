"""Where batches come from: worker processes, one thread that reads ahead, or the caller's own time.

All three give the same batches in the same order; none has state that matters. `take` waits for a limited time, so
that the caller can report what it is waiting for.
"""

from __future__ import annotations

import atexit
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils import signal_handling

from data.loading import worker_signals

_waiting = 0  # how many calls of `Workers.take` are under way in this process


def _loss_is_seen_when_waiting() -> None:
    """Let the end of a worker be reported where a batch is waited for, and nowhere else.

    torch raises it wherever the trainer happens to be: in the middle of an update, of a checkpoint, of an export.
    """
    report = signal.getsignal(signal.SIGCHLD)
    if not callable(report) or getattr(report, "__module__", "") != signal_handling.__name__:
        return  # not torch's

    def handler(number: int, frame: FrameType | None) -> None:
        if _waiting:
            report(number, frame)

    signal.signal(signal.SIGCHLD, handler)


class WorkerLostError(Exception):
    """A worker process ended without an exception (killed, out of memory, a crash in a decoder)."""


class Supply(Protocol):
    """An endless supply of batches."""

    def take(self) -> Any:
        """Return the next batch. Raises TimeoutError when it does not come within the supply's patience: ask again."""

    def close(self) -> None:
        """Stop reading."""


class InTurn:
    """A supply that makes each batch when it is asked for."""

    def __init__(self, make: Callable[[Any], Any], indices: Iterator[Any]) -> None:
        self.make, self.indices = make, indices

    def take(self) -> Any:
        """Return the next batch."""
        return self.make(next(self.indices))

    def close(self) -> None:
        """Do nothing: nothing runs."""


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class Ahead:
    """A supply whose thread makes up to `depth` batches while the caller computes."""

    def __init__(self, make: Callable[[Any], Any], indices: Iterator[Any], depth: int, patience: float) -> None:
        self.make, self.indices, self.patience = make, indices, patience
        self._ready: queue.Queue[Any] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches ahead", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # before the interpreter is torn down under a running decoder

    def _run(self) -> None:
        for index in self.indices:
            try:
                item = self.make(index)
            except BaseException as error:
                item = _Raised(error)
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set() or isinstance(item, _Raised):
                return

    def take(self) -> Any:
        """Return the next batch; an exception raised while it was made is raised here."""
        try:
            item = self._ready.get(timeout=self.patience)
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(item, _Raised):
            raise item.error
        return item

    def close(self) -> None:
        """End the thread. One that hangs in a read is abandoned; it ends with the process."""
        self._stop.set()
        atexit.unregister(self.close)
        self._thread.join(timeout=1.0)


def _unchanged(item: Any) -> Any:
    return item


class Workers:
    """A supply of worker processes that each make whole batches; these arrive in order."""

    def __init__(
        self,
        dataset: Dataset[Any],
        indices: Sampler[Any],
        workers: int,
        prefetch_factor: int,
        pin_memory: bool,
        patience: float,
    ) -> None:
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            worker_init_fn=worker_signals.begin,
            prefetch_factor=max(1, prefetch_factor),
            pin_memory=pin_memory,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # the default would draw from the global one
            timeout=patience,
        )
        with worker_signals.held():
            self._arriving: Iterator[Any] | None = iter(loader)
        if threading.current_thread() is threading.main_thread():  # no other one may set handlers, torch's neither
            _loss_is_seen_when_waiting()
        atexit.register(self.close)  # before multiprocessing terminates the remaining ones

    def take(self) -> Any:
        """Return the next batch. Raises WorkerLostError, and what a worker raised, with the worker's traceback."""
        global _waiting
        assert self._arriving is not None
        _waiting += 1
        try:
            signal_handling._error_if_any_worker_fails()  # one that ended since the last batch
            return next(self._arriving)
        except RuntimeError as error:
            text = str(error)
            if text.startswith("DataLoader timed out"):
                raise TimeoutError from None
            if text.startswith("DataLoader worker (pid"):
                raise WorkerLostError(text) from None
            raise
        finally:
            _waiting -= 1

    def close(self) -> None:
        """End the workers now, not when the last traceback that refers to them is collected."""
        atexit.unregister(self.close)
        self._arriving = None
