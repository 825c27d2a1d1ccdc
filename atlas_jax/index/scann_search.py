"""Approximate search on the host with ScaNN, for an index that the devices cannot hold."""

import dataclasses
import math
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Int
from msgspec import Meta

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError
from atlas_jax.core.types import NO_ROW, Array
from atlas_jax.index.search import SearchResult, check_k


@dataclasses.dataclass(frozen=True)
class ScannConfig:
    """Which kind of ScaNN index is used for which size, as ScaNN's documentation advises.

    Attributes:
      hash_from: from this many passages on, score compressed rows (asymmetric hashing) and
        rescore the best. With fewer, search by brute force, which is exact.
      tree_from: from this many passages on, also divide them into sqrt(n) leaves.
      leaves_searched: share of the leaves that a query searches, above 0, at most 1.
      rescored: least number of rows that are rescored exactly per query; never fewer than 4 k.
      hash_threshold: anisotropic quantisation threshold.
    """

    hash_from: bounds.AtLeast0 = 20_000
    tree_from: bounds.AtLeast0 = 100_000
    leaves_searched: Annotated[float, Meta(gt=0, le=1)] = 0.1
    rescored: bounds.AtLeast1 = 200
    hash_threshold: bounds.Share = 0.2

    def __post_init__(self) -> None:
        """Refuse sizes in the wrong order and shares out of range.

        Raises:
          UserError: names the binding at fault.
        """
        bounds.check(self)
        if self.hash_from > self.tree_from:
            raise UserError("ScannConfig.hash_from has to be between 0 and ScannConfig.tree_from")


class ScannSearcher:
    """ScaNN behind the Searcher protocol; takes and gives numpy arrays.

    Results are approximate from ``ScannConfig.hash_from`` passages on. The scores are always exact
    inner products, and there are k of them if exclusion leaves k. ScaNN draws its leaves at random:
    from ``ScannConfig.tree_from`` passages on, two builds of one index may differ in a few results.
    """

    def __init__(self, embeddings_ne: Array, config: ScannConfig = ScannConfig()) -> None:
        """Build the index in memory; a refreshed embedding array needs a new searcher.

        Args:
          embeddings_ne: float32 or bfloat16 embeddings of real passages only.

        Raises:
          UserError: ScaNN is not installed.
        """
        try:
            from scann import scann_ops_pybind
        except ImportError as error:
            raise UserError(
                f"ScaNN cannot be imported ({error}); it exists for Linux only: pip install "
                "scann there, or use exact search"
            ) from error
        self._config = config
        self.count = n = int(embeddings_ne.shape[0])
        rows_ne = np.asarray(embeddings_ne, np.float32)
        builder = scann_ops_pybind.builder(rows_ne, min(10, n), "dot_product")
        self.kind = "brute force"
        self._leaves = 0
        if n < config.hash_from:
            builder = builder.score_brute_force()
        else:
            self.kind = "hashed"
            if n >= config.tree_from:
                self.kind = "tree, hashed"
                self._leaves = max(1, round(math.sqrt(n)))
                builder = builder.tree(
                    num_leaves=self._leaves,
                    num_leaves_to_search=self._some_leaves(),
                    training_sample_size=min(n, 250_000),
                )
            builder = builder.score_ah(
                2, anisotropic_quantization_threshold=config.hash_threshold
            ).reorder(min(n, config.rescored))
        self._scann = builder.build()

    @property
    def is_approximate(self) -> bool:
        """Whether a search may miss some of the best rows."""
        return self.kind != "brute force"

    def search(
        self, query_be: Float[Array, "b e"], k: int, excluded_bx: Int[Array, "b x"] | None = None
    ) -> SearchResult:
        """See ``Searcher.search``."""
        check_k(k, self.count)
        query_be = np.asarray(query_be, np.float32)
        excluded_bx = np.asarray(
            np.full((len(query_be), 1), NO_ROW) if excluded_bx is None else excluded_bx
        )
        rows_bk, scores_bk = self._search(query_be, k, excluded_bx, self._some_leaves())
        # The leaves searched may have held fewer than k rows: then search all leaves.
        short_b = np.isneginf(scores_bk).any(axis=1)
        if self._leaves and short_b.any():
            rows_bk[short_b], scores_bk[short_b] = self._search(
                query_be[short_b], k, excluded_bx[short_b], self._leaves
            )
        return SearchResult(rows_bk=rows_bk, scores_bk=scores_bk)

    def _search(
        self, query_be: np.ndarray, k: int, excluded_bx: np.ndarray, leaves: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search k rows and as many as may be excluded, drop the excluded ones, keep k."""
        wanted = min(k + excluded_bx.shape[1], self.count)
        options: dict[str, Any] = {}
        if self.kind != "brute force":
            rescored = max(self._config.rescored, 4 * wanted)
            options["pre_reorder_num_neighbors"] = min(rescored, self.count)
        if self._leaves:
            options["leaves_to_search"] = leaves
        rows_bc, scores_bc = self._scann.search_batched(
            query_be, final_num_neighbors=wanted, **options
        )
        rows_bc = rows_bc.astype(np.int32)
        # ScaNN fills up with row 0 and score NaN where it found too few.
        drop_bc = np.isnan(scores_bc) | (rows_bc[:, :, None] == excluded_bx[:, None, :]).any(-1)
        scores_bc = np.where(drop_bc, -np.inf, scores_bc).astype(np.float32)
        rows_bc = np.where(drop_bc, NO_ROW, rows_bc)
        best_bk = np.lexsort((rows_bc, -scores_bc))[:, :k]
        return (
            np.take_along_axis(rows_bc, best_bk, axis=1),
            np.take_along_axis(scores_bc, best_bk, axis=1),
        )

    def _some_leaves(self) -> int:
        return max(1, math.ceil(self._leaves * self._config.leaves_searched))
