"""Search and gather as functions that a compiled step calls."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float, Int

from atlas_jax.core.packing import packed_or_padded
from atlas_jax.core.types import NO_ROW, Array, Batch, DeviceIndex, Edited, Params, Passages
from atlas_jax.index.exact import exact_search, gather_passages
from atlas_jax.index.search import included_first
from atlas_jax.models.towers import embed_passages
from atlas_jax.retriever.dual_encoder import DualEncoder

Retrieve = Callable[[Any, Array, Batch], Passages]


def make_device_retrieve(k: int, mesh: Mesh, recall_target: float = 1.0) -> Retrieve:
    """Search and gather k passages inside the compiled step; the source is a ``DeviceIndex``.

    ``recall_target``: see `exact_search`.
    """

    def retrieve(index: DeviceIndex, query_be: Array, batch: Batch) -> Passages:
        excluded_bx = batch.excluded_rows_bx
        found = exact_search(index, query_be, k, excluded_bx, mesh, recall_target)
        if batch.included_rows_b is not None:
            found = included_first(found, batch.included_rows_b)
        return gather_passages(index, found, mesh=mesh)

    return retrieve


def retrieved_already(passages: Passages, query_be: Float[Array, "b e"], batch: Batch) -> Passages:
    """The host form's "search": the passages come in as an argument."""
    del query_be, batch
    return passages


def no_passages(batch: Batch) -> Passages:
    """Closed book: one empty passage, so that the reader sees the query alone."""
    rows = batch.query_tokens_bq.shape[0]
    return Passages(
        rows_bk=jnp.full((rows, 1), -1, jnp.int32),
        scores_bk=jnp.zeros((rows, 1), jnp.float32),
        reader_tokens_bkl=jnp.zeros((rows, 1, 1), jnp.int32),
        retriever_tokens_bkm=jnp.zeros((rows, 1, 1), jnp.int32),
        mask_bk=jnp.ones((rows, 1), bool),
    )


def rerank(
    retriever: DualEncoder,
    params: Params,
    query_be: Float[Array, "b e"],
    passages: Passages,
    k: int,
    rows: int = 0,
) -> Passages:
    """Keep the k best of the passages found, scored with fresh embeddings of the passage tower.

    No gradient flows through it. Passages with equal scores keep the order of the search.

    Args:
      params: of the retriever.
      passages: more than k a query. Empty places stay last.
      rows: that the passages found for a query share in the tower, see `packed_or_padded`.
    """
    assert passages.retriever_tokens_bkm is not None
    tokens_bkm = passages.retriever_tokens_bkm.astype(jnp.int32)
    fresh_bke = packed_or_padded(
        lambda given: embed_passages(retriever, params, given), (tokens_bkm, rows)
    )
    query_be, fresh_bke = jax.lax.stop_gradient((query_be, fresh_bke))
    scores_bk = jnp.einsum("be,bke->bk", query_be, fresh_bke).astype(jnp.float32)
    scores_bk, best_bk = jax.lax.top_k(jnp.where(passages.mask_bk, scores_bk, -jnp.inf), k)

    def take(array: Array) -> Array:
        return _taken(array, best_bk)

    return Passages(
        rows_bk=take(passages.rows_bk),
        scores_bk=scores_bk,
        reader_tokens_bkl=take(passages.reader_tokens_bkl),
        retriever_tokens_bkm=take(passages.retriever_tokens_bkm),
        mask_bk=take(passages.mask_bk),
        embeddings_bke=take(fresh_bke),
        apart_bkf=None if passages.apart_bkf is None else take(passages.apart_bkf),
    )


def with_edited(
    retriever: DualEncoder,
    params: Params,
    query_be: Float[Array, "b e"],
    passages: Passages,
    edited: Edited,
) -> Passages:
    """Put the edited passages among those found, each at the place that its new text deserves.

    The search must have excluded their rows. As many passages are kept as were found. Equal scores
    leave a passage that was found in front.

    Args:
      params: of the retriever.

    Returns:
      The passages with tokens of the reader alone, as needed to read them.
    """
    fresh_bwe = embed_passages(retriever, params, edited.retriever_tokens_bwm)
    fresh_bw = jnp.einsum("be,bwe->bw", query_be, fresh_bwe).astype(jnp.float32)
    is_edited_bw = edited.rows_bw != NO_ROW
    mask_bc = jnp.concatenate([passages.mask_bk, is_edited_bw], axis=1)
    scores_bc = jnp.concatenate([passages.scores_bk, fresh_bw], axis=1)
    k = passages.rows_bk.shape[1]
    scores_bk, best_bk = jax.lax.top_k(jnp.where(mask_bc, scores_bc, -jnp.inf), k)

    def join(found: Array, new: Array) -> Array:
        return _taken(jnp.concatenate([found, new.astype(found.dtype)], axis=1), best_bk)

    return Passages(
        rows_bk=join(passages.rows_bk, edited.rows_bw),
        scores_bk=scores_bk,
        reader_tokens_bkl=join(passages.reader_tokens_bkl, edited.reader_tokens_bwl),
        retriever_tokens_bkm=None,
        mask_bk=_taken(mask_bc, best_bk),
    )


def at_most(passages: Passages, k_b: Int[Array, " b"]) -> Passages:
    """Mask all but each query's first passages; what only training needs is left out."""
    k = passages.rows_bk.shape[1]
    first_bk = jnp.arange(k, dtype=jnp.int32)[None] < k_b[:, None]
    mask_bk = jnp.logical_and(passages.mask_bk, first_bk)
    kept = passages.replace(  # type: ignore[attr-defined]
        mask_bk=mask_bk, retriever_tokens_bkm=None, embeddings_bke=None
    )
    return cast(Passages, kept)


def _taken(array: Array, best_bk: Array) -> Array:
    """The entries of [b, c, ...] at these places: [b, k, ...]."""
    places = best_bk.reshape(*best_bk.shape, *(1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, places, axis=1)
