"""Settings from command lines, prompts and axes from YAML files: read, checked, and templates filled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from data.records import one_line, read_bytes
from flamingo.configs.validate import examine, refuse
from flamingo.errors import UserError

T = TypeVar("T")


def settings_of(cls: type[T], texts: Mapping[str, str]) -> T:
    """Return a config from texts as a command line has them. Raises UserError with everything that is wrong."""
    values = {}
    for key, text in texts.items():
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            values[key] = text
    config, clauses = examine(cls, values)
    refuse(clauses)
    assert config is not None  # there would be a clause
    return config


def read_yaml(path: Path) -> dict[Any, Any]:
    """Return the table in a YAML file. Raises UserError for anything else."""
    try:
        content = yaml.safe_load(read_bytes(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} is not a table of names and values")
    return content


def named_file(setting: str, name: str, folder: Path) -> Path:
    """Return `folder/{name}.yaml`, or the file `name`. Raises UserError if there is neither."""
    known = folder / f"{name}.yaml"
    path = known if known.parent == folder and known.is_file() else Path(name)
    if not path.is_file():
        ours = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UserError(f"{setting}={name}: there is no such file; give {ours}, or a YAML file of your own")
    return path


def read_prompt(cls: type[T], name: str, folder: Path) -> T:
    """Return the prompt of that name as a checked `cls`. Raises UserError when there is none, or a wrong one."""
    path = named_file("prompt", name, folder)
    prompt, clauses = examine(cls, read_yaml(path))
    if prompt is None or clauses:
        raise UserError(f"{path}: {'; '.join(clauses)}")
    return prompt


def fields_in(text: str) -> set[str]:
    """Return the names of all `{name}` in a template."""
    return set(re.findall(r"\{(\w+)\}", text))


def filled(template: str, values: Mapping[str, str]) -> str:
    """Return the template with every `{name}` of `values` replaced; braces in the values stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda mark: values.get(mark[1], mark[0]), template)
