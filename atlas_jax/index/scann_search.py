"""Approximate search on the host with ScaNN, for an index that the devices cannot hold.

A corpus that was changed has several segments. Each large one has an index of its own; the small
ones are searched together. With several processes each one searches its own share of the rows, and
all of them get the same merged result.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from atlas_jax.core import multihost
from atlas_jax.core.types import NO_ROW, Array
from atlas_jax.index.scann_index import ScannConfig, ScannIndex
from atlas_jax.index.search import SearchResult, check_k

_WIDER = 4  # times as many rows and leaves are searched where too few living rows were found


@dataclasses.dataclass(frozen=True)
class Part:
    """An index over some rows of the whole.

    Attributes:
      index: over m rows.
      rows_m: int32, which row of the whole each of them is; -1 if it is deleted.
    """

    index: ScannIndex
    rows_m: np.ndarray


class ScannSearcher:
    """ScaNN behind the Searcher protocol; takes and gives numpy arrays.

    Results are approximate from ``ScannConfig.hash_from`` passages on. The scores are always exact
    inner products, and there are k of them if exclusion leaves k. ScaNN draws its leaves at random:
    from ``ScannConfig.tree_from`` passages on, two builds of one index may differ in a few results.
    """

    def __init__(self, parts: Sequence[Part], count: int, config: ScannConfig) -> None:
        """Search these parts.

        Args:
          parts: of this process; each living row is in one part of one process.
          count: living rows of all processes.
        """
        self.parts, self.count, self._config = tuple(parts), count, config

    @property
    def is_approximate(self) -> bool:
        """Whether a search may miss some of the best rows."""
        return any(part.index.kind != "brute force" for part in self.parts)

    def search(
        self, query_be: Float[Array, "b e"], k: int, excluded_bx: Int[Array, "b x"] | None = None
    ) -> SearchResult:
        """See ``Searcher.search``; all processes must call it, with the same queries."""
        check_k(k, self.count)
        query_be = np.asarray(query_be, np.float32)
        excluded_bx = np.asarray(
            np.full((len(query_be), 1), NO_ROW) if excluded_bx is None else excluded_bx
        )
        none = np.full((len(query_be), k), NO_ROW, np.int32)  # k of each process
        found = [(none, np.full(none.shape, -np.inf, np.float32))]
        found += [self._of_part(part, query_be, k, excluded_bx) for part in self.parts]
        rows_bk, scores_bk = best(found, k)
        rows_bk, scores_bk = best(multihost.of_all((rows_bk, scores_bk)), k)
        return SearchResult(rows_bk=rows_bk, scores_bk=scores_bk)

    def _of_part(
        self, part: Part, query_be: np.ndarray, k: int, excluded_bx: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best living rows of a part that are not excluded, all of them if there are fewer.

        As many rows more are searched as may be excluded or are likely to be deleted. Where too few
        are left, or the leaves searched held too few, the search is widened.
        """
        living, count = int((part.rows_m != NO_ROW).sum()), part.index.count
        if not living:
            none = np.full((len(query_be), k), NO_ROW, np.int32)
            return none, np.full(none.shape, -np.inf, np.float32)
        share = self._config.leaves_searched
        # An excluded row may lie in another part; then all of this one is searched.
        least_b = np.minimum(k, living - (excluded_bx != NO_ROW).sum(axis=1))
        wanted = min(-(-(k + excluded_bx.shape[1]) * count // living), count)
        rows_bk, scores_bk = self._living(part, query_be, k, excluded_bx, wanted, share)
        while wanted < count or share < 1:
            short_b = np.isfinite(scores_bk).sum(axis=1) < least_b
            if not short_b.any():
                break
            wanted, share = min(_WIDER * wanted, count), min(_WIDER * share, 1.0)
            rows_bk[short_b], scores_bk[short_b] = self._living(
                part, query_be[short_b], k, excluded_bx[short_b], wanted, share
            )
        return rows_bk, scores_bk

    def _living(
        self,
        part: Part,
        query_be: np.ndarray,
        k: int,
        excluded_bx: np.ndarray,
        wanted: int,
        share: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search so many rows of a part, drop the deleted and the excluded ones, keep k."""
        rescored = max(self._config.rescored, 4 * wanted)
        rows_bc, scores_bc = part.index.search(query_be, wanted, share, rescored)
        rows_bc = np.where(rows_bc == NO_ROW, NO_ROW, part.rows_m[rows_bc])
        excluded_bc = (rows_bc[:, :, None] == excluded_bx[:, None, :]).any(-1)
        drop_bc = excluded_bc | (rows_bc == NO_ROW)
        rows_bc = np.where(drop_bc, NO_ROW, rows_bc)
        return best([(rows_bc, np.where(drop_bc, -np.inf, scores_bc))], k)


def best(found: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of rows and scores [b, c] of several searches; -1 and -inf where there are fewer.

    Equal scores give the lower row first.
    """
    rows_bc = np.concatenate([rows for rows, _ in found], axis=1)
    scores_bc = np.concatenate([scores for _, scores in found], axis=1)
    more = max(0, k - rows_bc.shape[1])
    rows_bc = np.pad(rows_bc, ((0, 0), (0, more)), constant_values=NO_ROW).astype(np.int32)
    scores_bc = np.pad(scores_bc, ((0, 0), (0, more)), constant_values=-np.inf)
    best_bk = np.lexsort((rows_bc, -scores_bc))[:, :k]
    chosen_bk = np.take_along_axis(scores_bc, best_bk, axis=1).astype(np.float32)
    return np.take_along_axis(rows_bc, best_bk, axis=1), chosen_bk
