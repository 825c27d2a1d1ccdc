"""What self-training teaches: the seam between its loop and a kind of model."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from atlas_jax.core.types import Array, Params

Scores = dict[str, float]


class Lines(Protocol):
    """The lines of a file as arrays on the host, one row each."""

    @property
    def labels_b(self) -> Array:
        """int32 [b], the place of each line's label among the classes; -1 where it is not known."""

    def rows(self, index: Any) -> Any:
        """Some of the rows."""


def _nothing(params: Params) -> None:
    del params


def _as_they_are(params: Params, rows: Any) -> Any:
    del params
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taught:
    """A model and what it reads, as the loop of self-training sees them.

    Attributes:
      boxed: shapes of all parameters with their logical axes.
      patterns: of the paths that train.
      start: the parameters of step 0, on the host or in their shards.
      small: key -> what of them each round draws anew, such as adapters.
      logits: (parameters, rows, key for dropout or None) -> class logits [b, c].
      labelled, unlabelled: the lines of the two files.
      found: (parameters, rows on the mesh) -> rows as `logits` takes them, with what is looked up
        for them: a reader's passages. Called outside of the step, with parameters that never train.
      opened: called with all parameters before the first step; loads what `found` searches.
      scores: (parameters, step) -> the scores on the evaluation file; None without one.
      export: (folder, parameters, what the run has counted) writes the trained model.
    """

    boxed: Params
    patterns: tuple[str, ...]
    start: Callable[[], Params]
    small: Callable[[jax.Array], Params]
    logits: Callable[[Params, Any, jax.Array | None], jax.Array]
    labelled: Lines
    unlabelled: Lines
    export: Callable[[Path, Params, Mapping[str, Any]], None]
    scores: Callable[[Params, int], Scores] | None = None
    found: Callable[[Params, Any], Any] = _as_they_are
    opened: Callable[[Params], None] = _nothing
