"""The command line of `train.py`: hydra composes the config, and its mistakes become one line that names the key."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers.utils.logging import disable_progress_bar

from flamingo.errors import UserError
from flamingo.training.config import TrainConfig, flatten
from flamingo.training.distributed import fsdp, interruptions
from flamingo.training.distributed.launch import join_launcher

CONFIGS = Path(__file__).resolve().parents[2] / "hydra"
T = TypeVar("T")
ConfigStore.instance().store(name="train_schema", node=TrainConfig)


def main(train: Callable[[TrainConfig], Any]) -> None:
    """Run the command line and exit; a mistake of the user's is one line and status 2.

    Plain `key=value` arguments run at once; options of hydra (`-m`, `--help`, `--cfg job`) and launchers go through it.
    """

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
    def through_hydra(composed: DictConfig) -> None:
        join_launcher()
        interruptions.run_submitted(lambda: train(typed(composed)))

    def command() -> None:
        if any(argument.startswith(("-", "launch=")) for argument in sys.argv[1:]):
            through_hydra()
        else:
            join_launcher()
            train(compose(sys.argv[1:]))

    disable_progress_bar()  # transformers', one for every file it reads or writes
    fsdp.exit_process(interruptions.exit_status(command))


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
        raise UserError(f"{extra[0]} is not a key of the config")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, TrainConfig)
    return config


def typed_dataset(schema: type[T], values: dict[str, Any], path: str, wrong: list[str]) -> T | None:
    """Return the table at `path` as a dataclass; unknown fields and impossible values are added to `wrong`."""
    known = [field.name for field in fields(schema)]  # type: ignore[arg-type]
    wrong += [f"{path}.{key} is not a field of a dataset{nearest(key, known)}" for key in values if key not in known]
    given = {key: value for key, value in values.items() if key in known}
    try:
        made: T = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(given)))  # type: ignore[assignment]
        return made
    except (OmegaConfBaseException, UserError) as error:
        wrong.append(f"{path}: {str(error).strip().splitlines()[0]}")
        return None


def explain(error: Exception) -> str:
    """The message of an exception of hydra or omegaconf."""
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    wrong_type = re.search(r"Value '([^']*)' of type '[^']*' could not be converted to (\w+) full_key: (\S+)", text)
    if wrong_type:
        return f"{wrong_type[3]}={wrong_type[1]} is not of type {wrong_type[2]}"
    if unknown := re.search(r"Key '[^']+' not in '\w+' full_key: (\S+)", text):
        return f"{unknown[1]} is not a key of the config{nearest(unknown[1], list(flatten(TrainConfig().as_dict())))}"
    return re.split(r" full_key:| Config search path:| See https:", " ".join(str(error).split()))[0]


def nearest(key: str, known: Sequence[str]) -> str:
    """`: did you mean ...` when something alike exists."""
    close = difflib.get_close_matches(key, known, n=1)
    return f": did you mean {close[0]}?" if close else ""
