"""Types and bounds of settings: annotations state them, and this module checks them.

A field of a config is annotated with its type and, if it has any, its bounds:

    num_layers: Annotated[int, Meta(ge=1, le=512)]
    dropout_rate: BelowOne

Without bounds, whole numbers must fit into 32 bits and floats must be finite. The same annotation
applies to a gin binding, a Python call and a `config.json`.
"""

import dataclasses
import functools
import numbers
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from atlas_jax.core.errors import UserError

LARGEST = (1 << 31) - 1  # largest number that JAX or Optax counts with
WIDEST = 1 << 20  # largest width of a layer: 16 times T5-11B's widest

AtLeast0 = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0, le=LARGEST)]  # in a file, where no bound is implied
AtLeast1 = Annotated[int, Meta(ge=1)]
# Only the host counts with these. Released options use 10^10 for "never".
Every = Annotated[int, Meta(ge=0, le=1 << 53)]
Layers = Annotated[int, Meta(ge=1, le=512)]
Width = Annotated[int, Meta(ge=1, le=WIDEST)]
Vocabulary = Annotated[int, Meta(ge=1, le=1 << 24)]  # rows of an embedding
Seed = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
BatchSize = Annotated[int, Meta(ge=1, le=1 << 20)]
Passages = Annotated[int, Meta(ge=1, le=1 << 20)]  # per query
Length = Annotated[int, Meta(ge=1, le=1 << 20)]  # of a text, in tokens
LengthOrModels = Annotated[int, Meta(ge=0, le=1 << 20)]  # 0 = as long as the model takes
Port = Annotated[int, Meta(ge=0, le=65535)]
NotNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]

_INFINITE = 1e300  # also too large: products of two such numbers would be infinite
_LIMITS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "ge": (operator.ge, "{} or more"),
    "gt": (operator.gt, "more than {}"),
    "le": (operator.le, "at most {}"),
    "lt": (operator.lt, "less than {}"),
}


class Unknown:
    """A value that is not known yet; it fits every annotation."""


def check(config: Any, name: str = "") -> None:
    """Check every field of a config dataclass; for its `__post_init__`.

    Args:
      name: the class's name in gin, if it is another one.

    Raises:
      UserError: names the first field that does not fit its annotation, as a gin binding.
    """
    check_fields(type(config), vars(config), name or type(config).__name__)


def check_fields(config_class: type, fields: Mapping[str, Any], where: str) -> None:
    """Check values by name, such as those of a `config.json`, against a config's annotations.

    Raises:
      UserError: names `where` and the first field that is unknown or does not fit.
    """
    for name, value in fields.items():
        if name not in annotations(config_class):
            raise UserError(
                f"{where} has the unknown field {name}; another version wrote it, or it is misspelt"
            )
        problem = expected(annotations(config_class)[name], value)
        if problem:
            raise UserError(f"{where}.{name} = {shown(value)}: expected {problem}")


@functools.cache
def annotations(config_class: Any) -> dict[str, Any]:
    """Name -> annotation, with its bounds, of a dataclass's fields or a function's parameters."""
    try:
        hints = typing.get_type_hints(config_class, include_extras=True)
    except NameError:  # a name that is imported only for type checking
        return {}
    if dataclasses.is_dataclass(config_class):
        return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}
    return hints


def expected(annotation: Any, value: Any) -> str:
    """What the annotation demands if `value` does not fit it; '' if it fits.

    Annotations that are not used for settings accept any value.
    """
    if isinstance(value, Unknown) or annotation is Any:
        return ""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        limits = next((extra for extra in arguments[1:] if isinstance(extra, Meta)), Meta())
        return _number(arguments[0], limits, value)
    if origin in (typing.Union, types.UnionType):
        problems = [expected(argument, value) for argument in arguments]
        return "" if "" in problems else " or ".join(problems)
    if origin is Literal:
        return "" if value in arguments else " or ".join(map(repr, arguments))
    if annotation in (int, float):
        return _number(annotation, Meta(), value)
    if annotation is None or annotation is type(None):
        return "" if value is None else "None"
    if annotation in (bool, str, dict):
        words = {bool: "True or False", str: "a text", dict: "a dict"}
        return "" if isinstance(value, annotation) else words[annotation]
    if origin is Mapping:
        return "" if isinstance(value, Mapping) else "a dict"
    if annotation is Path:
        return "" if isinstance(value, str | Path) else "a path"
    if (origin or annotation) in (tuple, list, Sequence):
        return _several(origin or annotation, arguments, value)
    return ""


def _several(kind: Any, arguments: tuple[Any, ...], value: Any) -> str:
    taken = tuple | list if kind is Sequence else kind
    word = "list" if kind is Sequence else kind.__name__
    if not isinstance(value, taken):
        return f"a {word}"
    if not arguments:
        return ""
    if kind is tuple and arguments[-1] is not ...:
        if len(value) != len(arguments):
            return f"{len(arguments)} values"
        kinds = list(arguments)
    else:
        kinds = [arguments[0]] * len(value)
    problems = (expected(one, item) for one, item in zip(kinds, value, strict=True))
    problem = next(filter(None, problems), "")
    return f"a {word}, each item {problem}" if problem else ""


def _number(kind: Any, limits: Meta, value: Any) -> str:
    """As `expected`, for a whole number or a float."""
    stated = {n: bound for n in _LIMITS if (bound := getattr(limits, n)) is not None}
    is_number = isinstance(value, numbers.Integral if kind is int else numbers.Real)
    is_number = is_number and not isinstance(value, bool)
    if is_number and kind is float:
        is_number = _is_finite(value)
    implied = {"ge": -LARGEST, "le": LARGEST} if kind is int and "le" not in stated else {}
    if is_number and _fits(value, stated) and _fits(value, implied):
        return ""
    noun = "a whole number" if kind is int else "a finite number"
    told = implied if is_number and _fits(value, stated) else stated
    if {"ge", "le"} <= set(told):
        return f"{noun} from {told['ge']:,} to {told['le']:,}"
    return ", ".join([noun, *(_LIMITS[n][1].format(f"{bound:,}") for n, bound in told.items())])


def _is_finite(value: Any) -> bool:
    try:
        return abs(float(value)) < _INFINITE
    except OverflowError:
        return False


def _fits(value: Any, limits: Mapping[str, float]) -> bool:
    return all(_LIMITS[name][0](value, bound) for name, bound in limits.items())


def shown(value: Any) -> str:
    """A value for a message, shortened if it is long."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 70 else "a huge number"
    return text if len(text) <= 100 else f"{text[:97]}..."
