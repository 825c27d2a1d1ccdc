"""A step that is compiled once; if it is compiled again, it tells what has changed."""

import logging
from collections.abc import Callable
from typing import Any

import jax

from atlas_jax.core.memory import check_program_fits

_LOG = logging.getLogger(__name__)
_SHOWN = 3  # arguments that a warning names


class CompiledOnce:
    """A jitted step that warns of each compilation after its first.

    On a pod such a compilation takes minutes, and no process would say why it waits. On a CPU a
    step that needs more memory than there is would be killed, so it is refused before it runs.
    """

    def __init__(self, function: Callable[..., Any], *names: str, smaller: str) -> None:
        """Wrap the result of `jax.jit`.

        Args:
          function: the step.
          names: of its arguments, for the warnings.
          smaller: the bindings that make the step smaller, for the error.
        """
        self._function: Any = function
        self._names = names
        self._smaller = smaller
        self._programs = 0
        self._given: dict[str, str] = {}

    def __call__(self, step: int, *args: Any) -> Any:
        """Call the function; a warning names this `step`.

        Raises:
          UserError: the first step needs more memory than there is.
        """
        if not self._programs:  # the call below takes what is compiled here
            program = self._function.lower(*args).compile()
            check_program_fits(program, "a training step", self._smaller)
        result = self._function(*args)
        programs = self._function._cache_size()
        if programs > self._programs:  # donated arguments still know their shapes
            given = _describe(dict(zip(self._names, args, strict=True)))
            if self._programs:
                _LOG.warning("step %d was compiled again: %s", step, _changes(self._given, given))
            self._programs, self._given = programs, given
        return result


def _describe(args: dict[str, Any]) -> dict[str, str]:
    """Path -> `float32[8,16] on PartitionSpec(...)` of every array: a program depends on these."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _kind(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(args)
    }


def _kind(leaf: Any) -> str:
    aval = jax.typeof(leaf)
    where = getattr(leaf, "sharding", "the host")
    weak = " (weakly typed)" if getattr(aval, "weak_type", False) else ""
    return f"{aval.dtype}{list(aval.shape)}{weak} on {getattr(where, 'spec', where)}"


def _changes(before: dict[str, str], now: dict[str, str]) -> str:
    """The first few arguments that differ."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not names:
        return (
            "no argument has another shape, type or sharding; jax_explain_cache_misses=1 says why"
        )
    told = [
        f"{name} is {now.get(name, 'not there')}, was {before.get(name, 'not there')}"
        for name in names[:_SHOWN]
    ]
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return "; ".join([*told, *more])
