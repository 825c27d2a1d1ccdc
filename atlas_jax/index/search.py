"""The result of a search, and the protocol of all searchers."""

from typing import Protocol

import flax.struct
import jax.numpy as jnp
from jaxtyping import Float, Int

from atlas_jax.core.errors import UserError
from atlas_jax.core.types import Array


@flax.struct.dataclass
class SearchResult:
    """The best rows of each query, best first; equal scores give the lower row first.

    Attributes:
      rows_bk: int32 index rows; -1 where fewer than k rows were left after exclusion.
      scores_bk: float32 inner products; -inf where the row is -1.
    """

    rows_bk: Array
    scores_bk: Array


class Searcher(Protocol):
    """Maximum inner product search over an index, on the devices or on the host."""

    def search(
        self, query_be: Float[Array, "b e"], k: int, excluded_bx: Int[Array, "b x"] | None = None
    ) -> SearchResult:
        """Find the k rows with the greatest inner product.

        Args:
          query_be: query embeddings.
          k: number of rows per query.
          excluded_bx: int rows that each query may not get; -1 pads.

        Raises:
          UserError: k is below 1 or above the number of passages.
        """
        ...


def included_first(found: SearchResult, rows_b: Int[Array, " b"]) -> SearchResult:
    """Put one given row of each query first; if it was not found it replaces the worst row.

    It gets the score of the best row.

    Args:
      rows_b: int32, -1 changes nothing.
    """
    k = found.rows_bk.shape[1]
    is_it_bk = found.rows_bk == rows_b[:, None]
    at_b1 = jnp.where(is_it_bk.any(axis=1), jnp.argmax(is_it_bk, axis=1), k - 1)[:, None]
    place = jnp.arange(k, dtype=jnp.int32)[None]
    # The rows in front of it move one place down.
    source_bk = jnp.where(place <= at_b1, jnp.maximum(place - 1, 0), place)
    moved_bk = jnp.take_along_axis(found.rows_bk, source_bk, axis=1)
    moved_bk = jnp.where(place == 0, rows_b[:, None], moved_bk)
    scores_bk = jnp.take_along_axis(found.scores_bk, source_bk, axis=1)
    changes_b1 = rows_b[:, None] >= 0
    return SearchResult(
        rows_bk=jnp.where(changes_b1, moved_bk, found.rows_bk),
        scores_bk=jnp.where(changes_b1, scores_bk, found.scores_bk),
    )


def check_k(k: int, count: int) -> None:
    """Refuse a k for which the corpus is too small.

    Raises:
      UserError: k is below 1 or above ``count``, the number of passages.
    """
    if k < 1:
        raise UserError(f"cannot retrieve k={k} passages; k has to be at least 1")
    if k > count:
        raise UserError(
            f"cannot retrieve k={k} passages from an index of {count}; "
            f"set k to at most {count} or index more passages"
        )
