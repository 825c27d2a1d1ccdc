"""What a search gives back, and the one protocol that every searcher keeps."""

from typing import Protocol

import flax.struct

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

    def search(self, query_be: Array, k: int, excluded_bx: Array | None = None) -> SearchResult:
        """Find the k rows with the greatest inner product.

        Args:
          query_be: query embeddings.
          k: number of rows per query.
          excluded_bx: int rows that each query may not get; -1 pads.

        Raises:
          UserError: k is below 1 or above the number of passages.
        """
        ...


def check_k(k: int, count: int) -> None:
    """Refuse a k that the corpus cannot serve.

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
