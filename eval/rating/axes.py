"""What answers are rated on: Med-PaLM's axes for clinicians and for lay people, or one's own, as YAML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.instruct.settings import named_file, read_yaml
from flamingo.configs.validate import examine
from flamingo.errors import UserError

FOLDER = Path(__file__).parent / "axes"
SIDES = ("A", "B")
COMPARED = ("A is better", "No difference", "B is better")
MOST = 9
"""Options of an axis: each has a key of its own, 1 to 9."""


@dataclass(kw_only=True)
class Axis:
    """One question to the rater. The options go from best to worst if `ordered`."""

    question: str
    options: list[str] = field(default_factory=list)
    ordered: bool = True
    compares: bool = False
    """Asked once about both answers, with the options `COMPARED`, instead of about each answer."""

    def conflicts(self) -> Iterator[str]:
        """Yield a clause for each impossible combination of values."""
        known = [option.strip().casefold() for option in self.options]
        if not self.question.strip():
            yield "question is empty: say what is rated"
        if self.compares and self.options:
            yield f"options cannot be chosen where compares is true, they are {', '.join(COMPARED)}: remove them"
        if not self.compares and not 2 <= len(known) <= MOST:
            yield f"options has {len(known)} entries: give 2 to {MOST}"
        if len(set(known)) != len(known) or "" in known or any(option.isdecimal() for option in known):
            yield "options must be different texts that are not numbers: a table may hold their numbers instead"

    @property
    def choices(self) -> list[str]:
        """What can be chosen."""
        return list(COMPARED) if self.compares else self.options


def read_axes(names: str) -> dict[str, Axis]:
    """Return the axes of one or several comma-separated names of `FOLDER` or YAML files.

    Raises:
        UserError: a file is missing or wrong, or two files name the same axis.
    """
    axes: dict[str, Axis] = {}
    for name in names.split(","):
        path = named_file("axes", name, FOLDER)
        for key, axis in axes_of(read_yaml(path), str(path)).items():
            if key in axes:
                raise UserError(f"axes={names}: two files have an axis {key!r}; rename one")
            axes[key] = axis
    return axes


def axes_of(content: dict[Any, Any], where: str) -> dict[str, Axis]:
    """Return checked axes from plain values. Raises UserError that begins with `where`."""
    axes: dict[str, Axis] = {}
    clauses: list[str] = []
    for key, value in content.items():
        if not isinstance(key, str) or not key.isidentifier():
            clauses.append(f"{key!r} is not a name of letters, digits and underscores")
        elif not isinstance(value, dict):
            clauses.append(f"{key} is not a table with question and options")
        else:
            axis, wrong = examine(Axis, value, key)
            clauses += wrong
            axes |= {key: axis} if axis is not None else {}
    if clauses:
        raise UserError(f"{where}: {'; '.join(clauses)}")
    return axes


def plain(axes: dict[str, Axis]) -> dict[str, Any]:
    """Return the axes as plain values, the inverse of `axes_of`."""
    return {key: asdict(axis) for key, axis in axes.items()}
