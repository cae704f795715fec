"""Check plain tables against typed dataclasses and name every mistake at once: the key, its value and the limit.

Types, `Literal` choices and `Field` bounds are pydantic's. What two fields forbid together, a class says in a method
`conflicts()`, which yields clauses that begin with the name of one of its fields. Conflicts are looked for even where
some values are wrong: those are taken out, their defaults replace them, and the rest is checked again.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from flamingo.errors import UserError

T = TypeVar("T")
C = TypeVar("C", bound=type)
STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True, validate_default=True)

AtLeast0 = Annotated[int, Field(ge=0)]
AtLeast1 = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
# A single value means a list of that value.
AsList = BeforeValidator(lambda value: value if isinstance(value, list) else [value])

_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text (in quotes where it looks like something else)",
    "list": "a list, as in [a, b]",
    "dict": "a table, as in {key: value}",
    "dataclass": "a table, as in {key: value}",
}


def one_of(names: Iterable[str]) -> AfterValidator:
    """Return a check that a text is one of `names`, for choices that only a table at run time knows."""
    known = list(names)

    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"is not one of {', '.join(known)}")
        return value

    return AfterValidator(check)


def _named(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty (an unset variable?): name a folder")
    return value


Folder = Annotated[str, AfterValidator(_named)]


def examine(cls: type[T], table: Mapping[str, Any], at: str = "") -> tuple[T | None, list[str]]:
    """Build `cls` from a plain table and name everything that is wrong with it.

    Args:
        cls: a dataclass; its fields may be dataclasses, and tables and lists of such.
        table: plain nested dicts, lists and scalars; it is not changed.
        at: the path of `table` in the whole config, which every key in a clause begins with.

    Returns:
        The object, in which defaults replace wrong values (None: a missing value has no default), and one clause for
        each mistake.
    """
    table = values = deepcopy(dict(table))
    clauses: dict[str, str] = {}  # key -> clause; the first complaint about a key is kept
    unknown: list[str] = []
    value: T | None = None
    while True:
        try:
            value = _adapter(cls).validate_python([table])[0]  # type: ignore[arg-type]
            break
        except ValidationError as error:
            before = len(clauses)
            for fault in error.errors(include_url=False):
                path = tuple(fault["loc"][1:])
                key, clause, path = _describe(fault, path, at)
                clauses.setdefault(key, clause)
                if fault["type"] == "unexpected_keyword_argument":
                    unknown.append(key)
                _take_out(values, path, missing=fault["type"] == "missing")
            if len(clauses) == before:  # nothing new comes to light
                break
    names: dict[str, Any] = asdict(value) if value is not None else cls.__dataclass_fields__  # type: ignore
    known = list(flatten(names, f"{at}." if at else ""))
    for key in unknown:
        if close := _nearest(key, known):
            clauses[key] += f": did you mean {close}?"
    if value is not None:
        for key, clause in (*_disguised(table, value, at), *_conflicts(value, at)):
            clauses.setdefault(key, clause)
    return value, list(clauses.values())


def refuse(clauses: Iterable[str]) -> None:
    """Raise a `UserError` of one line with all clauses, if there are any."""
    if text := "; ".join(clauses):
        raise UserError(text)


def self_checking(name_of: Callable[[Any], str]) -> Callable[[C], C]:
    """Make the constructor of a pydantic dataclass raise `UserError`: `name_of(values)`, then every mistake."""

    def decorate(cls: C) -> C:
        build = cls.__init__  # type: ignore[misc]

        def refusing(self: Any, **values: Any) -> None:
            try:
                build(self, **values)
                clauses = list(self.conflicts())
            except ValidationError:
                clauses = examine(cls, values)[1]
            if clauses:
                raise UserError(f"{name_of(values)}: {'; '.join(clauses)}")

        cls.__init__ = refusing  # type: ignore[misc]
        return cls

    return decorate


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a table with dotted keys: `{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


@lru_cache
def _adapter(cls: Any) -> Any:
    # pydantic takes a config for a list of dataclasses, not for a dataclass; those inside inherit it.
    return TypeAdapter(list[cls], config=STRICT)


def _joined(at: str, path: tuple[int | str, ...]) -> str:
    for part in path:
        at += f"[{part}]" if isinstance(part, int) else f".{part}" if at else part
    return at


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _nearest(key: str, known: list[str]) -> str:
    """Return the key that was probably meant, a misspelt neighbour or the same name elsewhere; "" if there is none."""
    parent, _, name = key.rpartition(".")
    names = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == parent}
    if close := difflib.get_close_matches(name, names, n=1):
        return names[close[0]]
    return next((other for other in known if other.rpartition(".")[2] == name), "")


def _describe(fault: Any, path: tuple[int | str, ...], at: str) -> tuple[str, str, tuple[int | str, ...]]:
    """Return the key, the clause and the path of pydantic's complaint."""
    kind, context, key = fault["type"], fault.get("ctx", {}), _joined(at, path)
    if kind == "unexpected_keyword_argument":
        return key, f"unknown key {key}", path
    if kind == "missing":
        return key, f"{key} is missing: add {key}=VALUE", path
    own = re.match(r"(\w+_config\.)?(\w+)(.*)", str(context["error"])) if kind == "value_error" else None
    if own and (own[1] or (isinstance(fault["input"], dict) and own[2] in fault["input"])):
        # A class that checks itself names its field; the library's own name it as their caller in Python knows it.
        key = _joined(key, (own[2],))
        return key, key + own[3], (*path, own[2])
    given = f"{key}={_shown(fault['input'])}"
    if kind == "value_error":
        return key, f"{given} {context['error']}", path
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        return key, f"{given} is not one of {', '.join(allowed)}", path
    if kind == "too_short":
        return key, f"{key} is empty: give at least {context['min_length']}", path
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return key, f"{given} must be {words} {context[name]:g}", path
    return key, f"{given} must be {_TYPES.get(kind.split('_')[0], fault['msg'])}", path


def _take_out(table: dict[str, Any], path: tuple[int | str, ...], *, missing: bool) -> None:
    """Remove a wrong value, or the table that a value is missing in; a wrong list goes as a whole."""
    keys = [part for part in path if isinstance(part, str)]
    if missing and len(keys) == 1:
        table[keys[0]] = "???"  # takes the place of a text; other types have no such value
        return
    for key in keys[:-2] if missing else keys[:-1]:
        table = table[key]
    table.pop(keys[-2] if missing else keys[-1], None)


def _disguised(raw: Any, value: Any, at: str) -> Iterator[tuple[str, str]]:
    """Yield `true` and `false` where a number is wanted: pydantic takes them for 1 and 0."""
    if isinstance(raw, bool) and not isinstance(value, bool):
        yield at, f"{at}={_shown(raw)} must be a number"
    elif isinstance(raw, dict) and (is_dataclass(value) or isinstance(value, dict)):
        for key, inner in raw.items():
            own = value[key] if isinstance(value, dict) else getattr(value, key)
            yield from _disguised(inner, own, _joined(at, (key,)))
    elif isinstance(raw, list) and isinstance(value, list):
        for index, (inner, own) in enumerate(zip(raw, value, strict=True)):
            yield from _disguised(inner, own, _joined(at, (index,)))


def _conflicts(value: Any, at: str) -> Iterator[tuple[str, str]]:
    if is_dataclass(value):
        for clause in getattr(value, "conflicts", tuple)():
            yield clause, _joined(at, (clause,))
        value = {key: getattr(value, key) for key in value.__dataclass_fields__}
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _conflicts(inner, _joined(at, (key,)))
