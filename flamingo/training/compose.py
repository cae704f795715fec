"""hydra's and omegaconf's complaints in one line that names the key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flamingo.errors import UserError
from flamingo.training.config import TrainConfig, flatten

CONFIGS = Path(__file__).resolve().parents[2] / "hydra"


def compose(arguments: list[str]) -> TrainConfig:
    """`key=value` arguments to a typed config.

    hydra composes the groups (`experiment=...`); values are then set on the typed result, whose tables may grow.

    Raises:
        UserError: an unknown key or group, a value of the wrong type.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(arguments)
        groups = [o for o in overrides if o.key_or_group.startswith("hydra.") or (CONFIGS / o.key_or_group).is_dir()]
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = hydra.compose("train", overrides=[str(override.input_line) for override in groups])
        OmegaConf.set_struct(composed, False)  # the schema stays: only its own tables take new keys
        for override in overrides:
            if override not in groups:
                key = override.key_or_group
                merge = OmegaConf.select(composed, key) is not None  # omegaconf cannot merge onto nothing
                OmegaConf.update(composed, key, override.value(), merge=merge)
        return typed(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error


def typed(composed: Any) -> TrainConfig:
    """Return the composed YAML, an omegaconf `DictConfig`, as `TrainConfig`."""
    if extra := [str(key) for key in composed if key not in {field.name for field in fields(TrainConfig)}]:
        raise UserError(f"{extra[0]} is no key of the config")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, TrainConfig)
    return config


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
