"""Compose the YAML files of `hydra/` and `key=value` arguments into one plain table.

Only here does hydra read a command line. Choices of a group (`experiment=demo`) select files; every other
argument sets a value on top of them, whether or not a file mentions the key: the typed classes refuse unknown keys.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from flamingo.errors import UserError, first_line

CONFIGS = Path(__file__).resolve().parents[2] / "hydra"


_PLAIN_PATH = re.compile(r"[\w./=+@%~:-]+")


@dataclass
class CommandLine:
    """`key=value` arguments, read: which files they choose, which values they set, what is wrong with them."""

    choices: list[str] = field(default_factory=list)
    """Arguments that hydra composes with: choices of a group, and hydra's own settings."""
    values: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> value, in the order given."""
    problems: list[str] = field(default_factory=list)


def parse(argument: str) -> Override | None:
    """Return one argument as hydra reads it; None: it is not `key=value` in hydra's grammar.

    A path with `=` in it, as the folders of a sweep's jobs have, is a text here without quotes; so is whatever exists
    under that name, with commas too.
    """
    key, equals, value = argument.partition("=")
    is_path = "/" in value and (Path(value).exists() or ("=" in value and _PLAIN_PATH.fullmatch(value)))
    if equals and is_path and not key.startswith("hydra."):
        argument = f"{key}={quoted(value)}"
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def quoted(value: str) -> str:
    """Return a text as a value of hydra's grammar."""
    # A backslash escapes only in front of a quote, the closing one included.
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", "\\'"), value)
    return f"'{escaped}'"


def read(arguments: Sequence[str], groups: Collection[str]) -> CommandLine:
    """Read a command line. `groups` are the keys that choose files; other folders of `hydra/` are not asked."""
    line = CommandLine()
    parsed = [(argument, parse(argument)) for argument in arguments]
    folders = [CONFIGS]
    for _, override in parsed:
        if override is not None and override.key_or_group == "hydra.searchpath":
            folders += [Path(str(path).removeprefix("file://")) for path in override.value()]  # type: ignore[union-attr]
    for argument, override in parsed:
        if override is None:
            line.problems.append(f"{argument!r} cannot be read: write key=value{_quoting(argument)}")
        elif override.is_delete() or override.is_sweep_override():
            line.problems.append(
                f"{argument}: write key=value, with lists in brackets, for example shots=[0,4], and a text with commas "
                f"in quotes inside those of the shell, as in '{override.key_or_group}=\"a,b\"'"
            )
        elif override.key_or_group.startswith("hydra."):
            line.choices.append(argument)
        elif override.key_or_group in groups:
            _choose(line, override, folders)
        else:
            line.values[override.key_or_group] = override.value()
    return line


def _quoting(argument: str) -> str:
    """Return how to quote a value that hydra's grammar does not take as it is, for an error message."""
    key, equals, value = argument.partition("=")
    if not equals:
        return ""
    if "{" in value or "}" in value:
        return (
            ", where { } is a table, as in {a: 1}; a text with braces stands in quotes inside those of the shell: "
            "'data.datasets.a.shards=[\"a-{000..010}.tar\"]'"
        )
    return f", with the value in quotes inside those of the shell, as in '{key}=\"...\"'"


def _choose(line: CommandLine, override: Override, folders: Sequence[Path]) -> None:
    """Note the files that a group's argument names; a name without a file is a problem and is left out."""
    group, value = override.key_or_group, override.value()
    known = sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
    names = value if isinstance(value, list) else [value]
    bad = [name for name in names if name is not None and str(name) not in known]
    line.problems += [f"{group}={name} is not one of {', '.join(known)}" for name in bad]
    if not bad:
        line.choices.append(str(override.input_line))
    elif isinstance(value, list) and (good := [str(name) for name in names if name not in bad]):
        line.choices.append(f"{group}=[{','.join(good)}]")


def from_yaml(name: str, line: CommandLine) -> Any:
    """Compose `hydra/<name>.yaml` and the chosen files; values of the command line are not in it yet.

    Returns:
        An omegaconf `DictConfig` (untyped: beartype cannot check one).

    Raises:
        UserError: hydra cannot compose them.
    """
    outer = GlobalHydra.instance().hydra  # in a job that hydra runs, its own; it allows one at a time
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = hydra.compose(name, overrides=line.choices)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # a group that is null is the latter
        reason = f"{name}.yaml cannot be composed: {first_line(error)}"
        raise UserError("; ".join([*line.problems, reason])) from error
    finally:
        GlobalHydra.instance().hydra = outer
    OmegaConf.set_struct(config, False)
    return config


def settle(config: Any, line: CommandLine) -> dict[str, Any]:
    """Set the command line's values, resolve references and return plain nested tables without missing values.

    A reference that leads nowhere is added to the line's problems, and its key left out.
    """
    for key, value in line.values.items():
        OmegaConf.update(config, key, value, merge=True, force_add=True)
    while True:
        try:
            table: Any = OmegaConf.to_container(config, resolve=True)
            return _present(table)
        except InterpolationResolutionError as error:
            key = str(error.full_key)
            line.problems.append(f"{key}: {first_line(error)}")
            OmegaConf.update(config, key, "???")


def _present(value: Any) -> Any:
    """Leave out what the YAML marks as missing (`???`)."""
    if isinstance(value, dict):
        return {str(key): _present(inner) for key, inner in value.items() if inner != "???"}
    return value
