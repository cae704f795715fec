"""Where batches come from: worker processes, one thread that reads ahead, or the caller's own time.

All three give the same batches in the same order; none has state that matters. `take` waits at most some seconds, so
that the caller can say what is being waited for.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.loading import worker_signals


class WorkerLostError(Exception):
    """A worker process ended without a word (killed, out of memory, a crash in a decoder)."""


class Supply(Protocol):
    """Batches, one after the other, without end."""

    def take(self) -> Any:
        """The next one. Raises TimeoutError when it does not come within the supply's patience; then ask again."""

    def close(self) -> None:
        """Stop reading."""


class InTurn:
    """Each batch is made when it is asked for."""

    def __init__(self, make: Callable[[Any], Any], places: Iterator[Any]) -> None:
        self.make, self.places = make, places

    def take(self) -> Any:
        """The next batch."""
        return self.make(next(self.places))

    def close(self) -> None:
        """Nothing runs."""


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class Ahead:
    """One thread makes up to `depth` batches while the caller computes."""

    def __init__(self, make: Callable[[Any], Any], places: Iterator[Any], depth: int, patience: float) -> None:
        self.make, self.places, self.patience = make, places, patience
        self._ready: queue.Queue[Any] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches ahead", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # before the interpreter is taken down under a running decoder

    def _run(self) -> None:
        for place in self.places:
            try:
                item = self.make(place)
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
        """The next batch; what its making raised is raised here."""
        try:
            item = self._ready.get(timeout=self.patience)
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(item, _Raised):
            raise item.error
        return item

    def close(self) -> None:
        """End the thread. One that hangs in a read is left behind; it ends with the process."""
        self._stop.set()
        atexit.unregister(self.close)
        self._thread.join(timeout=1.0)


def _as_it_is(item: Any) -> Any:
    return item


class Workers:
    """Processes, each of which makes whole batches; they arrive in order."""

    def __init__(
        self,
        dataset: Dataset[Any],
        places: Sampler[Any],
        workers: int,
        prefetch_factor: int,
        pin_memory: bool,
        patience: float,
    ) -> None:
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=places,
            num_workers=workers,
            worker_init_fn=worker_signals.begin,
            prefetch_factor=max(1, prefetch_factor),
            pin_memory=pin_memory,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # or it would draw from the global one
            timeout=patience,
        )
        with worker_signals.held():
            self._arriving: Iterator[Any] | None = iter(loader)
        atexit.register(self.close)  # before multiprocessing ends what is left of them

    def take(self) -> Any:
        """The next batch. Raises WorkerLostError; what a worker raised is raised here with the worker's traceback."""
        assert self._arriving is not None
        try:
            return next(self._arriving)
        except RuntimeError as error:
            text = str(error)
            if text.startswith("DataLoader timed out"):
                raise TimeoutError from None
            if text.startswith("DataLoader worker (pid"):
                raise WorkerLostError(text) from None
            raise

    def close(self) -> None:
        """End the workers now, not when the last traceback that knows them is collected."""
        atexit.unregister(self.close)
        self._arriving = None
