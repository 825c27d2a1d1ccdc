"""The type checker of the tests: it looks at the arrays whose axes an annotation gives."""

import inspect
from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check axes and types of arrays; mypy looks at all other annotations."""
    annotations = function.__annotations__
    for name, annotation in annotations.items():
        if not _gives_axes(annotation):
            annotations[name] = Any
    return beartype(function)


def _gives_axes(annotation: Any) -> bool:
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return any(_gives_axes(part) for part in get_args(annotation))
