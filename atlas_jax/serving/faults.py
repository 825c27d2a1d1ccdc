"""Says what is wrong with a request, in the words that are used for files and settings."""

import types
import typing
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from atlas_jax.core.bounds import shown
from atlas_jax.core.errors import UserError

T = TypeVar("T", bound=BaseModel)

_BOUNDS = {
    "greater_than_equal": "a whole number of {ge:,} or more",
    "less_than_equal": "a whole number of {le:,} or less",
    "literal_error": "{expected}",
}
_WANTED = {
    "string_type": "a text", "int_type": "a whole number", "bool_type": "true or false",
    "list_type": "a list", "dict_type": "an object", "model_type": "an object", **_BOUNDS,
}  # fmt: skip
_GIVEN = {
    str: "a text", bool: "true or false", int: "a whole number", float: "a decimal number",
    list: "a list", dict: "an object", type(None): "null",
}  # fmt: skip


def validated(value: Any, kind: type[T], where: str) -> T:
    """A value of JSON as `kind`, which lets nothing pass that is of another type.

    Raises:
      UserError: a field is missing, unknown, of another type or out of bounds; it is named.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise UserError(f"{where}: {_explained(kind, faults)}") from None


def _explained(kind: type[BaseModel], faults: list[Any]) -> str:
    """The first field at fault: what it should be, and what it is."""
    paths = [_path(kind, one["loc"]) for one in faults]
    mine = [place for place, path in enumerate(paths) if path[:1] == paths[0][:1]]
    # A field that may be this or that has a fault for each; the deepest is of the nearest kind.
    path = max((paths[place] for place in mine), key=len)
    fault = faults[paths.index(path)]
    if fault["type"] == "missing":
        return f"the field {_name(path)} is missing"
    if fault["type"] == "extra_forbidden":
        known = ", ".join(_fields(kind, path))
        return f"the field {_name(path)} is unknown; the fields are {known}"
    wanted = [_wanted(faults[place]) for place in mine if paths[place] == path]
    given = fault["input"]
    got = shown(given) if fault["type"] in _BOUNDS else _GIVEN[type(given)]
    problem = f"expected {' or '.join(dict.fromkeys(wanted))}, got {got}"
    return f"{_name(path)}: {problem}" if path else problem


def _wanted(fault: Any) -> str:
    return _WANTED[fault["type"]].format(**fault.get("ctx", {}))


def _path(kind: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A place without the name of the kind that pydantic puts behind a field of several kinds."""
    field = kind.model_fields.get(str(loc[0])) if loc else None
    several = field and typing.get_origin(field.annotation) in (typing.Union, types.UnionType)
    return (*loc[:1], *loc[2:]) if several else loc


def _fields(kind: Any, path: tuple[int | str, ...]) -> list[str]:
    """The fields of the object that has, or should not have, the last part of a path."""
    for part in path[:-1]:
        if isinstance(part, str):
            (kind,) = typing.get_args(kind.model_fields[part].annotation)
    return list(kind.model_fields)


def _name(path: tuple[int | str, ...]) -> str:
    """A place as this project writes it: passages[0].id."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{_plain(part)}" for part in path)
    return "".join(parts).lstrip(".")


def _plain(name: str) -> str:
    return name if name.isidentifier() and len(name) < 100 else shown(name)
