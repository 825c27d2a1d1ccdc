"""Embed part of a device index anew, in place: the index is never gathered or copied.

Row numbers count in the corpus, not in a shard. So the same rows are refreshed on any number of
devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int, Integer

from atlas_jax.core.partitioning import index_axes
from atlas_jax.core.types import Array, Params
from atlas_jax.index.exact import first_row, gather_rows, mesh_for
from atlas_jax.index.int8 import dtype_of, stored_as

EmbedTokens = Callable[[Params, Array], Array]  # (parameters, tokens_nm) -> embeddings_ne


def refresh_rows(
    embed: EmbedTokens,
    params: Params,
    embeddings_ne: Any,
    retriever_tokens_nm: Integer[Array, "n m"],
    rows_r: Int[Array, " r"],
    batch_size: int,
    mesh: Mesh | None = None,
) -> Any:
    """Embed some rows of an index with the present passage tower.

    Jit it and donate ``embeddings_ne``. Only the tokens and embeddings of these rows move between
    devices.

    Args:
      embed: the passage tower, without dropout.
      params: its parameters.
      embeddings_ne: float32, bfloat16 or `Int8Rows`, sharded as `placement.rows_sharding` says.
      retriever_tokens_nm: tokens of every row, sharded likewise.
      rows_r: int32 rows to embed, without duplicates.
      batch_size: see ``embed_tokens``.
      mesh: mesh of the index; the active one if not given.

    Returns:
      ``embeddings_ne`` with new values in these rows, in its own type.
    """
    (tokens_1rm,) = gather_rows((retriever_tokens_nm,), rows_r[None], mesh)
    fresh_re = embed_tokens(embed, params, tokens_1rm[0], batch_size)
    return replace_rows(embeddings_ne, rows_r, stored_as(fresh_re, dtype_of(embeddings_ne)), mesh)


def embed_tokens(
    embed: EmbedTokens, params: Params, tokens_nm: Integer[Array, "n m"], batch_size: int
) -> Float[Array, "n e"]:
    """Embed tokens [n, m], at most ``batch_size`` rows of them in memory at a time: [n, e]."""
    n, m = tokens_nm.shape
    if n <= batch_size:
        return embed(params, tokens_nm)
    parts = -(-n // batch_size)
    filled = jnp.pad(tokens_nm, ((0, parts * batch_size - n), (0, 0)), mode="edge")
    tokens_pbm = filled.reshape(parts, batch_size, m)  # one part after the other
    embedded_pbe = jax.lax.map(lambda tokens_bm: embed(params, tokens_bm), tokens_pbm)
    return embedded_pbe.reshape(parts * batch_size, -1)[:n]


def replace_rows(
    array_nx: Any, rows_r: Int[Array, " r"], values_rx: Any, mesh: Mesh | None = None
) -> Any:
    """Write rows of an array that is sharded on axis n; each device writes those it holds.

    Args:
      array_nx: an array or `Int8Rows`, sharded as `placement.rows_sharding` says.
      rows_r: int32 rows, without duplicates.
      values_rx: what to write, of the same type, the same on every device.
      mesh: mesh of the array; the active one if not given.
    """
    mesh = mesh_for(mesh, array_nx.shape[0])
    if mesh is None:
        return jax.tree.map(lambda old, new: old.at[rows_r].set(new), array_nx, values_rx)

    def write_shard(array_nx: Any, rows_r: Array, values_rx: Any) -> Any:
        n = array_nx.shape[0]
        local_r = rows_r - first_row(mesh, n)
        held_r = (local_r >= 0) & (local_r < n)
        # A row of another device goes past the end, where nothing is written.
        at_r = jnp.where(held_r, local_r, n)
        return jax.tree.map(
            lambda old, new: old.at[at_r].set(new, mode="drop"), array_nx, values_rx
        )

    every, whole = PartitionSpec(index_axes(mesh)), PartitionSpec()
    return jax.shard_map(write_shard, mesh=mesh, in_specs=(every, whole, whole), out_specs=every)(
        array_nx, rows_r, values_rx
    )
