"""Measure how stale an index is: embed a sample of its passages anew and compare."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError
from atlas_jax.core.types import Array


@dataclasses.dataclass(frozen=True)
class StalenessConfig:
    """The staleness meter of a run, and the refresh that it may start.

    Attributes:
      every: steps between two measurements; 0 = none.
      passages: size m of the probe, passages drawn from the whole corpus once.
      k: of stale recall@k. The k best of m probe passages represent the k n / m best of all n.
      refresh_below: the whole index is embedded anew when stale recall@k falls below this;
        0 = never.
      seed: of the probe.
    """

    every: bounds.AtLeast0 = 0
    passages: bounds.AtLeast1 = 1024
    k: bounds.AtLeast1 = 10
    refresh_below: bounds.Share = 0.0
    seed: bounds.Seed = 0

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
          UserError: names the binding and what it may be.
        """
        bounds.check(self)
        if self.k > self.passages:
            raise UserError(
                f"StalenessConfig.k = {self.k} is more than StalenessConfig.passages = "
                f"{self.passages}, the probe that it is taken from"
            )
        if self.refresh_below and not self.every:
            raise UserError(
                f"StalenessConfig.refresh_below = {self.refresh_below} is never looked at: bind "
                "StalenessConfig.every to the steps between two measurements"
            )

    def due(self, step: int) -> bool:
        """Whether to measure once ``step`` steps are done; after step 0 never."""
        return self.every > 0 and step > 0 and step % self.every == 0

    def probe_rows(self, count: int) -> Int[np.ndarray, " p"]:
        """The rows of the probe in a corpus of ``count`` passages, ascending; always the same.

        Raises:
          UserError: the corpus has fewer than k.
        """
        if self.k > count:
            raise UserError(
                f"StalenessConfig.k = {self.k} is more than the {count} passages of the corpus"
            )
        rng = np.random.Generator(np.random.Philox(key=self.seed))
        rows = rng.choice(count, size=min(self.passages, count), replace=False)
        return np.sort(rows).astype(np.int32)


def measure(
    query_be: Float[Array, "b e"],
    weight_b: Float[Array, " b"],
    stale_pe: Float[Array, "p e"],
    fresh_pe: Float[Array, "p e"],
    k: int,
) -> dict[str, Float[Array, ""]]:
    """Compare the embeddings of p probe passages in the index with fresh ones.

    ``stale_recall``: for each query, take the k best probe passages by their fresh embeddings, and
    the k best by the embeddings in the index. The recall is the share of the first that is also
    among the second; its mean is over the queries with weight 1. Of equal scores the lower row
    comes first. 1 = the search misses nothing.
    ``drift``: |fresh - stale| / |fresh| with Euclidean norms, the mean over the probe.
    0 = nothing has changed.

    Args:
      query_be: queries by the present query tower.
      weight_b: 1 for a real query, 0 for one that only fills the batch.
      stale_pe: as they lie in the index, float32 or bfloat16.
      fresh_pe: by the present passage tower, rounded to the type of the index.
      k: at most p.

    Returns:
      Both as float32 scalars.
    """
    stale_pe, fresh_pe = stale_pe.astype(jnp.float32), fresh_pe.astype(jnp.float32)

    def best(embedded_pe: Array) -> Array:
        scores_bp = jnp.einsum(
            "be,pe->bp",
            query_be.astype(jnp.float32),
            embedded_pe,
            precision=jax.lax.Precision.HIGHEST,
        )
        return jax.lax.top_k(scores_bp, k)[1]

    found_bk, wanted_bk = best(stale_pe), best(fresh_pe)
    kept_b = (wanted_bk[:, :, None] == found_bk[:, None, :]).any(axis=-1).mean(axis=-1)
    moved_p = jnp.linalg.norm(fresh_pe - stale_pe, axis=-1)
    size_p = jnp.maximum(jnp.linalg.norm(fresh_pe, axis=-1), jnp.finfo(jnp.float32).tiny)
    return {
        "stale_recall": (kept_b * weight_b).sum() / jnp.maximum(weight_b.sum(), 1),
        "drift": (moved_p / size_p).mean(),
    }
