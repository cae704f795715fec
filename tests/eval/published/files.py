"""How the small files are written."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.eval.worlds import COLOURS
from tests.fixtures import png

COUNT = 6
TINTS = list(COLOURS.values())


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def dump_lines(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def dump_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(TINTS[seed % len(TINTS)], seed))


def clip(folder: Path, seed: int) -> None:
    """A video as a folder of frames."""
    for number in range(3):
        image(folder / f"{number:03d}.png", seed * 3 + number)


def ten(answer: str, key: str = "answer") -> list[dict[str, Any]]:
    return [{key: answer if n else "other", "answer_confidence": "yes", "answer_id": n + 1} for n in range(10)]
