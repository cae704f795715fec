"""Repeats reads that fail for a reason that may pass: a lost mount, a dropped connection, a busy server.

A read that keeps failing stops the run. It is never answered with another sample: the order would then depend on
chance.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from data.errors import StorageError, warn
from flamingo.errors import UserError

T = TypeVar("T")
PATIENCE = 300.0  # seconds that storage may be away
FIRST_WAIT = 0.2  # seconds before the second attempt; doubled before each further one,
LONGEST_WAIT = 10.0  # up to this
PERMANENT = (PermissionError, IsADirectoryError, NotADirectoryError)  # these do not go away


class Backoff:
    """The waits between attempts, and when to give up: after `patience` seconds, or after `attempts` attempts."""

    def __init__(self, what: str, patience: float, attempts: int | None, first_wait: float) -> None:
        self.what, self.patience, self.attempts, self.first_wait = what, patience, attempts, first_wait
        self._next_line = 5.0  # seconds after which a line says what is waited for
        self.restart()

    def restart(self) -> None:
        """Begin to count anew: the last attempt brought something."""
        self.begun, self.failed = time.monotonic(), 0

    def wait(self, reason: object, at_least: float = 0.0) -> bool:
        """Wait after an attempt that failed, as long as the other side asks for; return whether to try again."""
        self.failed += 1
        waited = time.monotonic() - self.begun
        if waited >= self.patience or (self.attempts is not None and self.failed >= self.attempts):
            return False
        if waited >= self._next_line:
            self._next_line = waited + 60.0
            warn(f"{self.what} cannot be read ({reason}); tried for {waited:.0f} s of {self.patience:.0f} s")
        pause = max(at_least, min(LONGEST_WAIT, self.first_wait * 2 ** min(self.failed - 1, 30)))
        time.sleep(min(pause, self.patience - waited))
        return True

    def spent(self) -> str:
        """Return the attempts and their time in words."""
        return f"{self.failed} attempts over {time.monotonic() - self.begun:.1f} s"


class Retry:
    """Runs reads that may fail with OSError and counts how often one had to be repeated."""

    def __init__(self, attempts: int | None = None, first_wait: float = FIRST_WAIT, patience: float = PATIENCE) -> None:
        self.attempts, self.first_wait, self.patience = attempts, first_wait, patience
        self.repeats = 0

    def __call__(self, read: Callable[[], T], what: str) -> T:
        """Return the result of `read`.

        Raises StorageError "`what` ..." when it failed for too long, UserError when it cannot succeed.
        """
        backoff = Backoff(what, self.patience, self.attempts, self.first_wait)
        while True:
            try:
                return read()
            except PERMANENT as error:
                raise UserError(f"{what} cannot be read: {error.strerror or error}") from None
            except OSError as error:
                missing = isinstance(error, FileNotFoundError)
                reason = "it does not exist" if missing else str(error) or repr(error)
            if not backoff.wait(reason):
                raise StorageError(
                    f"{what} could not be read in {backoff.spent()}: {reason}; repair the storage and start again, the "
                    "run resumes from its last checkpoint"
                ) from None
            self.repeats += 1
