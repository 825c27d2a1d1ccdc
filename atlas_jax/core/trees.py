"""Parts of parameter trees by patterns of paths: the one place that says what a pattern means."""

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from atlas_jax.core.errors import UserError
from atlas_jax.core.types import Params


def split(params: Params, patterns: Sequence[str], binding: str = "") -> tuple[Params, Params]:
    """The leaves whose path fits a pattern, and the others; `joined` is the inverse.

    Args:
      params: nested dicts.
      patterns: of '/'-joined paths, as in a shell; a star also goes over slashes.
      binding: what set the patterns, for messages; "" lets a pattern fit nothing.

    Raises:
      UserError: a pattern fits no leaf; the most similar paths are named.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    chosen: set[str] = set()
    for pattern in patterns:
        found = {path for path in flat if fnmatch.fnmatchcase(path, pattern)}
        if binding and not found:
            raise UserError(
                f"{binding}: {pattern!r} is the path of no parameter that can train; most like it "
                f"are {', '.join(_most_like(pattern, list(flat))) or 'none at all'}"
            )
        chosen |= found
    parts = ({p: x for p, x in flat.items() if (p in chosen) is wanted} for wanted in (True, False))
    first, second = (traverse_util.unflatten_dict(part, sep="/") for part in parts)
    return first, second


def _most_like(pattern: str, paths: list[str]) -> list[str]:
    return difflib.get_close_matches(pattern.replace("*", ""), paths, n=3, cutoff=0.0)


def joined(first: Params, second: Params) -> Params:
    """Two trees without a leaf in common as one."""
    result: dict[str, Any] = dict(first)
    for name, value in second.items():
        if name in result:
            assert isinstance(value, dict) and isinstance(result[name], dict), name
            result[name] = joined(result[name], value)
        else:
            result[name] = value
    return result


def count(tree: Params) -> int:
    """The numbers in a tree of arrays or of their shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
