"""Prompts as YAML files: read, checked and filled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import yaml

from data.records import one_line, read_bytes
from flamingo.configs.validate import examine, refuse
from flamingo.errors import UserError

T = TypeVar("T")


def read_prompt(cls: type[T], name: str, folder: Path) -> T:
    """Return the prompt in `folder/{name}.yaml`, or in the file `name`, as a checked `cls`.

    Raises:
        UserError: there is no such file, or something in it is wrong.
    """
    known = folder / f"{name}.yaml"
    path = known if known.parent == folder and known.is_file() else Path(name)
    if not path.is_file():
        ours = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UserError(f"prompt={name}: there is no such file; give {ours}, or a YAML file of your own")
    try:
        content = yaml.safe_load(read_bytes(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a table of settings")
    prompt, clauses = examine(cls, content)
    try:
        refuse(clauses)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    assert prompt is not None  # there would be a clause
    return prompt


def fields_in(text: str) -> set[str]:
    """Return the names of all `{name}` in a template."""
    return set(re.findall(r"\{(\w+)\}", text))


def filled(template: str, values: Mapping[str, str]) -> str:
    """Return the template with every `{name}` of `values` replaced; braces in the values stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda mark: values.get(mark[1], mark[0]), template)
