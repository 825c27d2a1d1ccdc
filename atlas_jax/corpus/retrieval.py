"""Search and gather as functions that a compiled step calls."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float

from atlas_jax.core.types import Array, Batch, DeviceIndex, Params, Passages
from atlas_jax.index.exact import exact_search, gather_passages
from atlas_jax.index.search import included_first
from atlas_jax.models.towers import embed
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


def retrieved_already(passages: Passages, query_be: Array, batch: Batch) -> Passages:
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
) -> Passages:
    """Keep the k best of the passages found, scored with fresh embeddings of the passage tower.

    No gradient flows through it. Passages with equal scores keep the order of the search.

    Args:
      params: of the retriever.
      passages: more than k a query. Empty places stay last.
    """
    assert passages.retriever_tokens_bkm is not None
    b, found, m = passages.retriever_tokens_bkm.shape
    flat = passages.retriever_tokens_bkm.reshape(b * found, m)  # every passage on its own
    fresh_bke = embed(retriever, params, "embed_passage", flat).reshape(b, found, -1)
    query_be, fresh_bke = jax.lax.stop_gradient((query_be, fresh_bke))
    scores_bk = jnp.einsum("be,bke->bk", query_be, fresh_bke).astype(jnp.float32)
    scores_bk, best_bk = jax.lax.top_k(jnp.where(passages.mask_bk, scores_bk, -jnp.inf), k)

    def take(array: Array) -> Array:
        return jnp.take_along_axis(array, best_bk.reshape(b, k, *(1,) * (array.ndim - 2)), axis=1)

    return Passages(
        rows_bk=take(passages.rows_bk),
        scores_bk=scores_bk,
        reader_tokens_bkl=take(passages.reader_tokens_bkl),
        retriever_tokens_bkm=take(passages.retriever_tokens_bkm),
        mask_bk=take(passages.mask_bk),
        embeddings_bke=take(fresh_bke),
        apart_bkf=None if passages.apart_bkf is None else take(passages.apart_bkf),
    )
