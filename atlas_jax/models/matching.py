"""Compare saved arrays with those of a model or a run, and name the first that differs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from atlas_jax.core.errors import UserError


def describe(tree: Any) -> dict[str, str]:
    """Path -> "float32[512,256]" of every array of a pytree, in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in leaves
    }


def first_difference(found: Mapping[str, str], expected: Mapping[str, str]) -> str | None:
    """Name the first array in which two descriptions differ, parameters before the rest."""
    names = [*expected, *(name for name in found if name not in expected)]
    for name in sorted(names, key=lambda name: not name.startswith("params")):
        there, here = found.get(name, "absent"), expected.get(name, "absent")
        if there != here:
            return f"{name} is {there} there and {here} here"
    return None


def check_params(params: Any, expected: Any, source: str | Path) -> None:
    """Refuse parameters that do not fit a model.

    Args:
      params, expected: trees of arrays or ShapeDtypeStructs.
      source: named in the error: where `params` came from.

    Raises:
      UserError: names the first parameter that differs.
    """
    difference = first_difference(describe(params), describe(expected))
    if difference:
        raise UserError(f"{source} is a checkpoint of another model: parameter {difference}")
