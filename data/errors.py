"""The three kinds of failure on the way from a shard to a batch, and how each is met.

A sample whose *content* is bad (an undecodable picture, broken JSON) is replaced by another one, always the same one,
and counted: that is `ContentError`. What the user must mend first (a missing shard, a page that names pictures it does
not have) is a `flamingo.errors.UserError` and stops the run with one sentence. Anything else is a bug and keeps its
traceback.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from flamingo.errors import UserError


class ContentError(Exception):
    """A sample that cannot be used. `reason` is one of a few words to count by, `detail` is for the reader."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class BadSample(NamedTuple):
    """One replaced sample."""

    dataset: str
    reason: str
    shard: str
    key: str
    detail: str


@dataclass(slots=True)
class BadSampleCounter:
    """Counts replaced samples and stops the run when they are no longer the exception.

    The limit is `max_rate` of all samples seen so far, plus a grace of `grace` samples, so that one bad picture at the
    very start does not end a run.
    """

    max_rate: float = 0.02
    grace: int = 8
    seen: int = 0
    by_sample: Counter[BadSample] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """How many samples were replaced."""
        return sum(self.by_sample.values())

    def by_reason(self) -> dict[tuple[str, str], int]:
        """Counts by (dataset, reason)."""
        counts: Counter[tuple[str, str]] = Counter()
        for sample, number in self.by_sample.items():
            counts[sample.dataset, sample.reason] += number
        return dict(counts)

    def add(self, samples: int, bad: Iterable[BadSample]) -> None:
        """Count a batch. Raises UserError, naming the last bad sample, when too many samples are bad."""
        self.seen += samples
        last = None
        for last in bad:
            self.by_sample[last] += 1
        if last is not None and self.total > self.grace + self.max_rate * self.seen:
            raise UserError(
                f"{self.total} of {self.seen} samples were bad (limit {self.max_rate:.0%} and {self.grace}), the last "
                f"one key {last.key!r} of {last.shard} in dataset {last.dataset!r}: {last.reason}, {last.detail}; find "
                "them with: python -m data verify"
            )
