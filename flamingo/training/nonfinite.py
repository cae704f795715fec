"""Updates whose loss or gradient is not finite: left out, counted, and stopped at when there are too many in a row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flamingo.errors import UserError
from flamingo.training.distributed.fsdp import Processes


class Skipped:
    """Counts updates that were left out. All processes call it with the same facts, so that all of them do the same."""

    def __init__(self, run_dir: Path, processes: Processes, limit: int) -> None:
        """`limit`: of those in a row."""
        self._run_dir, self._processes, self._limit = run_dir, processes, limit
        self.total = self.in_a_row = 0

    def add(self, step: int, norm: float, losses: Sequence[float], keys: Mapping[str, list[list[str]]]) -> None:
        """Update `step` (counted from 0) is left out; what this process had in its batch is written down.

        Args:
            step: updates before this one.
            norm: of the gradient.
            losses: of each dataset on this process, in the order of `keys`.
            keys: of each dataset, the samples' keys piece by piece.

        Raises:
            UserError: it is one too many.
        """
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        where = self._run_dir / f"nonfinite-step-{step:08d}-rank-{self._processes.rank}.json"
        told = dict(zip(keys, map(str, losses), strict=True))  # as text: JSON has no nan
        facts: dict[str, Any] = {"step": step, "grad_norm": str(norm), "losses": told}
        where.write_text(json.dumps({**facts, **keys}))
        if self.in_a_row > self._limit:
            before = f" ({self.in_a_row} updates in a row)" if self._limit else ""
            raise UserError(
                f"update {step}: the gradient is not finite, and no weight was changed{before}; the keys of the batch "
                f"are in {where}: lower optim.lr, or look at these documents with python -m data inspect"
            )

    def fine(self) -> None:
        """An update was made."""
        self.in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """From a checkpoint; an older one has none."""
        self.total, self.in_a_row = state.get("total", 0), state.get("in_a_row", 0)
