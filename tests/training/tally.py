"""What the kill campaign has found, as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Row:
    """What happened to the runs of one layout: processes of the killed starts, and of the last one."""

    runs: int = 0
    kills: int = 0
    inside: int = 0
    """Of these, while a checkpoint was being written."""
    one: int = 0
    """Of these, of one process of two."""
    half_written: int = 0
    """Of these, that left a checkpoint without its marker."""
    resumed: Counter[int] = field(default_factory=Counter)
    """Update of the checkpoint that a start went on from, 0 for none."""
    apart: float = 0.0
    """Largest difference of a loss."""
    wrong: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        """As in the table."""
        steps = sorted(step for step in self.resumed if step)
        starts = sum(number for step, number in self.resumed.items() if step)
        of = f"{starts} (updates {steps[0]} to {steps[-1]})" if steps else "0"
        kills = [self.runs, self.kills, self.inside, self.kills - self.inside, self.one, self.half_written]
        return [*map(str, kills), of, str(self.resumed[0]), f"{self.apart:.1e}", str(len(self.wrong))]


COLUMNS = (
    "processes",
    "runs",
    "kills",
    "inside a save",
    "between saves",
    "of one of two",
    "half-written left",
    "starts from a checkpoint",
    "from nothing",
    "largest difference",
    "wrong",
)


def table(rows: dict[tuple[int, int], Row]) -> str:
    """All layouts as Markdown, and what was wrong in words."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [(str(a) if a == b else f"{a} -> {b}", *row.cells()) for (a, b), row in sorted(rows.items())]
    wrong = [f"wrong: {text}" for row in rows.values() for text in row.wrong]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + wrong)
