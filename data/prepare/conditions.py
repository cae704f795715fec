"""Conditions on what a source knows about a document or image: `--where 'similarity>=0.28' 'NSFW=UNLIKELY'`.

They let scores of models that are not part of this project (perplexity, NSFW, watermarks, aesthetics) decide what is
kept, wherever a source brings such scores along.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from data.prepare.units import Dropped
from flamingo.errors import UserError

CONDITION = re.compile(r"^([\w.-]+)\s*(>=|<=|!=|>|<|=)\s*(.*)$")
Condition = tuple[str, str, str]  # name, comparison, value


def add_where(parser: argparse.ArgumentParser, about: str, example: str = "similarity>=0.28") -> None:
    """Add the option --where."""
    help_text = f"keep only what meets all conditions; names are of {about}, such as {example!r}"
    parser.add_argument("--where", nargs="+", default=[], metavar="CONDITION", help=help_text)


@lru_cache(maxsize=4)
def conditions_of(texts: tuple[str, ...]) -> list[Condition]:
    """Return the parsed conditions. Raises UserError for a malformed one."""
    parsed = []
    for text in texts:
        match = CONDITION.match(text)
        if match is None:
            raise UserError(f"--where {text!r} is not a condition; write it like 'similarity>=0.28' or 'NSFW=UNLIKELY'")
        parsed.append((match[1], match[2], match[3]))
    return parsed


def hold(facts: Mapping[str, Any], conditions: Sequence[Condition]) -> None:
    """Raise Dropped unless all conditions hold: as numbers where both sides are, else as text (= and != only)."""
    for name, compare, value in conditions:
        _hold(facts, name, compare, value)


def _hold(facts: Mapping[str, Any], name: str, compare: str, value: str) -> None:
    have = facts.get(name)
    if have is None:
        raise Dropped(f"no {name!r}")
    left: Any = str(have)
    right: Any = value
    try:
        left, right = float(have), float(value)
    except (TypeError, ValueError):
        if compare not in ("=", "!="):
            raise Dropped(f"{name!r} is not a number") from None
    holds = {
        "=": left == right,
        "!=": left != right,
        "<": left < right,
        ">": left > right,
        "<=": left <= right,
        ">=": left >= right,
    }
    if not holds[compare]:
        raise Dropped(f"not {name}{compare}{value}")
