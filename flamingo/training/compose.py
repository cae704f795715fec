"""hydra's and omegaconf's complaints in one line that names the key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from flamingo.training.config import TrainConfig, flatten


def explain(error: Exception) -> str:
    """The message of an exception of hydra or omegaconf."""
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    wrong_type = re.search(r"Value '([^']*)' of type '[^']*' could not be converted to (\w+) full_key: (\S+)", text)
    if wrong_type:
        return f"{wrong_type[3]}={wrong_type[1]} is not of type {wrong_type[2]}"
    if unknown := re.search(r"Key '[^']+' not in '\w+' full_key: (\S+)", text):
        return f"{unknown[1]} is no key of the config{nearest(unknown[1], list(flatten(TrainConfig().as_dict())))}"
    return re.split(r" full_key:| Config search path:| See https:", " ".join(str(error).split()))[0]


def nearest(key: str, known: Sequence[str]) -> str:
    """`: did you mean ...` when something alike exists."""
    close = difflib.get_close_matches(key, known, n=1)
    return f": did you mean {close[0]}?" if close else ""
