"""Tables of options: dataclasses made from mappings, and the checks of their values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from flamingo.errors import UserError

T = TypeVar("T")


def from_dict(cls: type[T], options: Mapping[str, Any] | T | None, where: str) -> T:
    """Build a dataclass from a mapping; an unknown key is named together with the known ones.

    Raises:
        UserError: an unknown key.
    """
    if isinstance(options, cls):
        return options
    values: dict[str, Any] = dict(options or {})  # type: ignore[arg-type]
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    if unknown := [key for key in values if key not in known]:
        raise UserError(f"{where}.{unknown[0]} is not an option; known are {', '.join(known)}")
    return cls(**values)


def choice(name: str, value: str | None, allowed: Iterable[str | None]) -> None:
    """Raise UserError unless the value is one of `allowed`."""
    if value not in allowed:
        raise UserError(f"{name}={value!r} must be one of {', '.join(map(str, allowed))}")


def positive(name: str, value: int | None) -> None:
    """Raise UserError if the value is below 1; None is allowed."""
    if value is not None and value < 1:
        raise UserError(f"{name}={value} must be at least 1")
