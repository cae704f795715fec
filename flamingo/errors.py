"""Errors that the user can mend.

Everything else (a broken invariant, a bug) stays an ordinary exception with its traceback. Entry points turn a
`UserError` into one line on stderr and exit status 2.
"""

from __future__ import annotations

from flamingo.terminal import printable


class UserError(ValueError):
    """A mistake in the input. Its message is one sentence: what, where, the limit and the remedy.

    It may name what data hold (keys, file names), so it is shown on one line and without control characters.
    """

    def __str__(self) -> str:
        return printable(super().__str__()).replace("\n", "\\n")


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, or the name of its class where the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
