"""The kinds of failure on the way from a shard to a batch, and how each is handled.

A sample whose *content* is bad (an undecodable image, broken JSON) raises `ContentError`; it is counted and replaced by
another sample, always the same one. A failed read is repeated, then stops the run (`data.shards.retry`). What the user
must fix first (a missing shard, a document that names images it does not have) is a `flamingo.errors.UserError` and
stops the run with one sentence. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flamingo.errors import UserError
from flamingo.files import write_atomically


class ContentError(Exception):
    """A sample that cannot be used. `reason` is a short phrase to count by, `detail` is for the reader."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class StorageError(UserError):
    """Storage that stayed away for longer than the run waits. Nothing is wrong with the data: the run can go on."""


def warn(message: str) -> None:
    """Print one line on stderr, at once."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class PassedOver(Exception):  # noqa: N818 (not an error)
    """A good sample that the recipe leaves out at random. Another one replaces it, and nothing is counted as bad."""


class BadSample(NamedTuple):
    """A replaced sample."""

    dataset: str
    reason: str
    shard: str
    key: str
    detail: str


@dataclass(slots=True)
class BadSampleCounter:
    """Counts replaced samples and stops the run when there are too many.

    The limit is `max_rate` of the newest `window` samples, plus `grace` samples, so that one bad image at the very
    start does not end a run and a long clean past does not hide a bad present.
    """

    max_rate: float = 0.02
    grace: int = 8
    window: int = 10_000
    seen: int = 0
    by_sample: Counter[BadSample] = field(default_factory=Counter)
    _recent: deque[tuple[int, int]] = field(default_factory=deque)
    _recent_seen: int = 0
    _recent_bad: int = 0

    @property
    def total(self) -> int:
        """Number of replaced samples."""
        return sum(self.by_sample.values())

    def by_reason(self) -> dict[tuple[str, str], int]:
        """Return counts by (dataset, reason)."""
        counts: Counter[tuple[str, str]] = Counter()
        for sample, number in self.by_sample.items():
            counts[sample.dataset, sample.reason] += number
        return dict(counts)

    def add(self, samples: int, bad: Iterable[BadSample]) -> None:
        """Count a batch. Raises UserError, naming the last bad sample, when too many of the newest are bad."""
        bad = list(bad)
        self.seen += samples
        self.by_sample.update(bad)
        self._recent.append((samples, len(bad)))
        self._recent_seen += samples
        self._recent_bad += len(bad)
        while self._recent_seen - self._recent[0][0] >= self.window:
            old = self._recent.popleft()
            self._recent_seen -= old[0]
            self._recent_bad -= old[1]
        if bad and self._recent_bad > self.grace + self.max_rate * self._recent_seen:
            last = bad[-1]
            raise UserError(
                f"{self._recent_bad} of {self._recent_seen} samples were bad (limit {self.max_rate:.0%} and "
                f"{self.grace}), the last one key {last.key!r} of {last.shard} in dataset {last.dataset!r}: "
                f"{last.reason}, {last.detail}; find them with: python -m data verify"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as plain values, for a checkpoint."""
        by_sample = [[list(sample), number] for sample, number in self.by_sample.items()]
        return {"seen": self.seen, "by_sample": by_sample, "recent": [list(batch) for batch in self._recent]}

    def load_state_dicts(self, states: Iterable[dict[str, Any]]) -> None:
        """Go on from the counts of one rank of a stopped run, or of several that this one stands for now."""
        for state in states:
            self.seen += state["seen"]
            for sample, number in state["by_sample"]:
                self.by_sample[BadSample(*sample)] += number
            for samples, bad in state["recent"]:
                self._recent.append((samples, bad))
                self._recent_seen += samples
                self._recent_bad += bad


def _is_before(line: str, step: int) -> bool:
    """Return whether a line is readable and belongs to an earlier step."""
    try:
        return int(json.loads(line)["step"]) < step
    except (ValueError, KeyError, TypeError):
        return False


class BadSampleLog:
    """A file with a JSON line for every replaced sample of this rank: step, dataset, reason, shard, key, detail.

    A resumed run drops the lines of its first step and later ones, since it writes them again. Raises UserError when
    the file cannot be written.
    """

    def __init__(self, path: Path, rank: int = 0, world_size: int = 1) -> None:
        self.path = path if rank == 0 else self._of(path, rank)
        # A run that goes on with fewer processes: the first one also looks after the files of those that are no more.
        others = path.parent.glob(f"{path.stem}-rank-*{path.suffix}") if rank == 0 else ()
        left = {self._of(path, number) for number in range(world_size)}
        self._files = [self.path, *sorted(other for other in others if other not in left)]

    @staticmethod
    def _of(path: Path, rank: int) -> Path:
        return path.with_name(f"{path.stem}-rank-{rank:05d}{path.suffix}")

    def start(self, step: int) -> None:
        """Keep the lines of the steps before this one."""
        for path in filter(Path.exists, self._files):
            text = path.read_text(encoding="utf-8", errors="replace")
            # The last line may have been cut off when the run was killed.
            kept = "".join(f"{line}\n" for line in text.split("\n")[:-1] if _is_before(line, step))
            if kept != text:
                write_atomically(path, kept)

    def write(self, step: int, bad: Iterable[BadSample]) -> None:
        """Append the replaced samples of a step."""
        lines = [json.dumps({"step": step} | sample._asdict(), ensure_ascii=False) + "\n" for sample in bad]
        if not lines:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(lines))
        except OSError as error:
            raise UserError(f"the list of bad samples {self.path} cannot be written ({error})") from None
