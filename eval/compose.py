"""Composes `hydra/eval.yaml`, the chosen tasks, the protocol and the command line into a checked `EvalConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from eval.config import EvalConfig
from eval.protocols import settings_of
from flamingo.configs.compose import CommandLine, from_yaml, read, settle
from flamingo.configs.validate import examine, refuse
from flamingo.errors import UserError


def load_config(arguments: Sequence[str]) -> EvalConfig:
    """Return the checked config of a command line.

    Only the choice of tasks selects files: `model` and `data`, which are groups of the trainer too, are values here.

    Raises:
        UserError: everything that is wrong with the arguments or with the values they lead to.
    """
    line = read(arguments, groups=("task",))
    config = from_yaml("eval", line)
    _leave_out_other_tasks(config, line)
    _apply_protocol(config, line)
    checked, clauses = examine(EvalConfig, settle(config, line))
    refuse([*line.problems, *clauses])
    assert checked is not None  # there would be a clause
    return checked


def _leave_out_other_tasks(config: DictConfig, line: CommandLine) -> None:
    """Note settings of tasks that are not chosen: setting them would make tasks of them."""
    for key in [key for key in line.values if key.startswith("task.") and key.split(".")[1] not in config.task]:
        line.problems.append(f"{key} is a setting of a task that is not chosen: the tasks are {', '.join(config.task)}")
        del line.values[key]


def _apply_protocol(config: DictConfig, line: CommandLine) -> None:
    """Put the protocol's settings over those of the tasks' files; the command line comes after them."""

    def given(key: str) -> Any:
        value = line.values.get(key)
        return OmegaConf.select(config, key) if value is None else value

    protocol, bugs = str(given("protocol")), given("bug_compatible") is True
    for name, task in config.task.items():
        form = str(given(f"task.{name}.form") or "")
        try:
            config.task[name] = OmegaConf.merge(task or {}, settings_of(protocol, str(name), form, bugs))
        except UserError as error:
            if str(error) not in line.problems:  # an unknown protocol is the same mistake for each task
                line.problems.append(str(error))
