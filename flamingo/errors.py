"""Errors that the user can mend.

Everything else (a broken invariant, a bug) stays an ordinary exception with its traceback. Entry points turn a
`UserError` into one line on stderr and exit status 2.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the input. Its message is one sentence: what, where, the limit and the remedy."""
