"""Repeats reads that fail for a reason that may pass: a lost mount, a dropped connection, a busy server.

A read that keeps failing stops the run. It is never answered with another sample: the order would then depend on
chance.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from flamingo.errors import UserError

T = TypeVar("T")
ATTEMPTS = 5
FIRST_WAIT = 0.2  # seconds before the second attempt; doubled before each further one
PERMANENT = (PermissionError, IsADirectoryError, NotADirectoryError)  # these do not go away


class Retry:
    """Runs reads that may fail with OSError and counts how often one had to be repeated."""

    def __init__(self, attempts: int = ATTEMPTS, first_wait: float = FIRST_WAIT) -> None:
        self.attempts, self.first_wait = attempts, first_wait
        self.repeats = 0

    def __call__(self, read: Callable[[], T], what: str) -> T:
        """Return the result of `read`. Raises UserError "`what` ..." when it failed every time or cannot succeed."""
        begun = time.monotonic()
        for attempt in range(1, self.attempts + 1):
            try:
                return read()
            except PERMANENT as error:
                raise UserError(f"{what} cannot be read: {error.strerror or error}") from None
            except OSError as error:
                failure = error
            if attempt < self.attempts:
                self.repeats += 1
                time.sleep(self.first_wait * 2 ** (attempt - 1))
        reason = "it does not exist" if isinstance(failure, FileNotFoundError) else str(failure) or repr(failure)
        raise UserError(
            f"{what} could not be read in {self.attempts} attempts over {time.monotonic() - begun:.1f} s: {reason}; "
            "repair the storage and start again, the run resumes from its last checkpoint"
        ) from None
