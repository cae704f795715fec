"""Filled sheets, read back: every rating belongs to the plan, and nobody has rated one thing in two ways."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.records import read_bytes, read_json, table_rows
from eval.rating.axes import SIDES, Axis
from eval.rating.plan import FORMAT, KEY, Plan
from eval.rating.sheets import BOTH, COLUMNS
from flamingo.errors import UserError


@dataclass(frozen=True)
class Rating:
    """What one rater chose. `system` is None where two answers were compared; then `value` is 0 if the first
    system is better, 1 for no difference, 2 if the second is. Elsewhere it is the option's position."""

    rater: str
    question: str
    system: int | None
    axis: str
    value: int


@dataclass(frozen=True)
class Filled:
    """All ratings, and for each rater of the plan (rated, asked); `repeated` were handed in twice, the same."""

    ratings: list[Rating]
    done: dict[str, tuple[int, int]]
    repeated: int


def files_in(names: Sequence[str]) -> list[Path]:
    """Return the files, and the JSON files and tables of folders. Raises UserError for what is not there."""
    files: list[Path] = []
    for name in names:
        path = Path(name)
        inside = [file for file in sorted(path.glob("*")) if file.suffix.lower() in (".json", ".csv")]
        if not path.exists():
            raise UserError(f"{path} does not exist; give the files that the raters sent back")
        files += [file for file in inside if file.name != KEY] if path.is_dir() else [path]
    if not files:
        raise UserError("there is no filled sheet; give the JSON files or tables that the raters sent back")
    return files


def read_filled(files: Sequence[Path], plan: Plan) -> Filled:
    """Return the ratings of all files.

    Raises:
        UserError: a file is not a filled sheet of this plan, or one thing is rated in two ways.
    """
    known: dict[tuple[str, str, str, str], tuple[int, Path]] = {}
    repeated, clashes = 0, []
    for path in files:
        for rater, item, side, axis, value in _values(path, plan):
            key = rater, item, side, axis
            if key not in known:
                known[key] = value, path
            elif known[key][0] == value:
                repeated += 1
            else:
                clashes.append((key, known[key], (value, path)))
    if clashes:
        (rater, item, side, axis), *both = clashes[0]
        texts = [f"{plan.axes[axis].choices[value]!r} in {path}" for value, path in both]
        raise UserError(
            f"{len(clashes)} things are rated in two ways, the first is {axis} of item {item}, side {side}, by "
            f"{rater}: {' and '.join(texts)}; ask {rater} which holds and leave out the other file"
        )
    ratings = [_rating(plan, *key, value) for key, (value, _) in sorted(known.items())]
    if not ratings:
        raise UserError(f"no axis is filled in {len(files)} files; give the sheets that the raters filled")
    return Filled(ratings, _done(plan, ratings), repeated)


def _done(plan: Plan, ratings: Sequence[Rating]) -> dict[str, tuple[int, int]]:
    compared = sum(axis.compares for axis in plan.axes.values())
    each = compared + (len(plan.axes) - compared) * len(plan.systems)
    rated = Counter(rating.rater for rating in ratings)
    return {rater: (rated[rater], each * len(own)) for rater, own in plan.sheets.items()}


def _rating(plan: Plan, rater: str, item: str, side: str, axis: str, value: int) -> Rating:
    """Say which system it is about, which the rater did not know."""
    order = dict(plan.sheets[rater])[item]
    if side == BOTH:
        return Rating(rater, item, None, axis, value if order[0] == 0 else 2 - value)
    return Rating(rater, item, order[SIDES.index(side)], axis, value)


def _values(path: Path, plan: Plan) -> Iterator[tuple[str, str, str, str, int]]:
    """Yield (rater, item, side, axis, position of the option) of a file, checked against the plan."""
    items = {rater: dict(own) for rater, own in plan.sheets.items()}
    for where, sheet, rater, item, side, axis, text in _cells(path, plan):
        place = f"{path}: {where}"
        if sheet != plan.sheet:
            raise UserError(
                f"{place} is of sheet {sheet}, and the key is of {plan.sheet}: it was made for other runs, axes or "
                "another seed; give the key.json that was written with it as key="
            )
        if rater not in items:
            raise UserError(f"{place} is by rater {rater!r}; the raters of the key are {', '.join(items)}")
        if item not in items[rater]:
            raise UserError(f"{place} is about item {item!r}, which is not on the sheet of {rater}")
        if axis not in plan.axes:
            raise UserError(f"{place} is about axis {axis!r}; the axes are {', '.join(plan.axes)}")
        sides = (BOTH,) if plan.axes[axis].compares else SIDES[: len(plan.systems)]
        if side not in sides:
            raise UserError(f"{place} has side {side!r} for {axis}; it must be {' or '.join(sides)}")
        yield rater, item, side, axis, _position(text, plan.axes[axis], place, axis)


def _position(text: str, axis: Axis, place: str, name: str) -> int:
    """Return the position of an option that is given by its text, in any letters, or by its number from 1."""
    options = [option.strip().casefold() for option in axis.choices]
    given = " ".join(text.split()).casefold()
    if given in options:
        return options.index(given)
    if given.isdecimal() and 1 <= int(given) <= len(options):
        return int(given) - 1
    raise UserError(f"{place} has {text!r} for {name}; it must be {', '.join(axis.choices)}, or a number from 1")


def _cells(path: Path, plan: Plan) -> Iterator[tuple[str, str, str, str, str, str, str]]:
    """Yield (where, sheet, rater, item, side, axis, text) of everything that is filled in."""
    if path.suffix.lower() == ".csv":
        yield from _table(path, plan)
        return
    body: Any = read_json(path)
    if not isinstance(body, dict) or not isinstance(body.get("ratings"), list) or body.get("format") != FORMAT:
        raise UserError(f"{path} is not a filled sheet; give what the page's export wrote, or its table")
    for number, entry in enumerate(body["ratings"], 1):
        values = [entry.get(key) for key in ("item", "side", "axis", "value")] if isinstance(entry, dict) else [None]
        texts = [body.get("sheet"), body.get("rater"), *values]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}: rating {number} is not made of texts; export the page again")
        sheet, rater, item, side, axis, text = texts
        yield f"rating {number}", sheet, rater, item, side, axis, text


def _table(path: Path, plan: Plan) -> Iterator[tuple[str, str, str, str, str, str, str]]:
    head = read_bytes(path).split(b"\n", 1)[0]
    mark = re.match(rb'"?sheet"?([;\t])', head)  # as the spreadsheet's country has it
    delimiter = mark[1].decode() if mark else ","
    for number, row in enumerate(table_rows(path, COLUMNS, delimiter), 1):
        for column, text in row.items():
            axis = re.sub(r"\s*\[.*", "", column, flags=re.DOTALL)
            # A dash is where the row does not ask for the axis.
            if column not in COLUMNS and text.strip() and not (text.strip() == "-" and axis in plan.axes):
                yield f"row {number}", row["sheet"], row["rater"], row["item"], row["side"], axis, text
