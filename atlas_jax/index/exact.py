"""Exact maximum inner product search over an index that is spread over all devices of a slice.

It can be used inside jit. Each device searches its own rows and passes on k candidates, so the
index itself never moves. With several slices, each searches its own copy for its own queries. All
other searchers are tested against this one. With a recall target below 1 the selection on each
device is approximate: a partial reduction, on a TPU as fast as the matrix product (Chern et al.
2022, arXiv:2206.14286).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int, Shaped

from atlas_jax.core.partitioning import active_mesh, index_axes, index_parts, over_slices
from atlas_jax.core.types import NO_ROW, Array, DeviceIndex, Passages
from atlas_jax.index.int8 import as_floats, inner_products
from atlas_jax.index.search import SearchResult, check_k

MAX_BLOCK = 128  # rows per block of the two-stage selection; a power of two


def exact_search(
    index: DeviceIndex,
    query_be: Float[Array, "b e"],
    k: int,
    excluded_bx: Int[Array, "b x"] | None = None,
    mesh: Mesh | None = None,
    recall_target: float = 1.0,
) -> SearchResult:
    """Find the k rows with the greatest inner product, exactly unless told otherwise.

    No gradient flows through the result; training computes the scores again. For a bfloat16 or int8
    index the query is rounded to bfloat16. Sums are float32 in any case.

    Args:
      index: its arrays sharded as `placement.rows_sharding` says.
      query_be: query embeddings.
      k: rows per query (static).
      excluded_bx: int rows that each query may not get; -1 pads.
      mesh: mesh of the index; the active one if not given.
      recall_target: share of a device's best rows that must be found (static). Below 1 a TPU
        selects approximately; other devices still select exactly.

    Returns:
      The same result on every device of a slice. Rows are -1 where exclusion leaves fewer than k.

    Raises:
      UserError: k is below 1 or above the number of rows (of passages, where
        ``index.count`` is known, outside jit).
      ValueError: the mesh does not divide the rows; ``placement.to_device`` pads them.
    """
    n = index.embeddings_ne.shape[0]
    check_k(k, n if isinstance(index.count, jax.core.Tracer) else int(index.count))
    mesh = mesh_for(mesh, n)
    if excluded_bx is None:
        excluded_bx = jnp.full((query_be.shape[0], 1), NO_ROW, jnp.int32)
    query_be, embeddings_ne = jax.lax.stop_gradient((query_be, index.embeddings_ne))
    local = functools.partial(
        _search_rows, k=min(k, n // (index_parts(mesh) if mesh else 1)), recall_target=recall_target
    )
    if mesh is None:
        rows_bk, scores_bk = local(0, embeddings_ne, index.count, query_be, excluded_bx)
        return SearchResult(rows_bk=rows_bk, scores_bk=scores_bk)

    axes, queries = index_axes(mesh), over_slices(mesh, query_be.shape[0])

    def search_shard(embeddings_ne: Array, *args: Array) -> tuple[Array, Array]:
        found = local(first_row(mesh, embeddings_ne.shape[0]), embeddings_ne, *args)
        # Candidates of all shards side by side, in row order: a tie still goes to the lower row.
        rows_bc, scores_bc = jax.lax.all_gather(found, axes, axis=1, tiled=True)
        scores_bk, best_bk = jax.lax.top_k(scores_bc, k)
        return jnp.take_along_axis(rows_bc, best_bk, axis=1), scores_bk

    rows_bk, scores_bk = jax.shard_map(
        search_shard,
        mesh=mesh,
        in_specs=(PartitionSpec(axes), PartitionSpec(), queries, queries),
        out_specs=(queries, queries),
        check_vma=False,  # it cannot see that all devices of a slice get the same result
    )(embeddings_ne, index.count, query_be, excluded_bx)
    return SearchResult(rows_bk=rows_bk, scores_bk=scores_bk)


def gather_passages(index: DeviceIndex, result: SearchResult, mesh: Mesh | None = None) -> Passages:
    """Fetch tokens and embeddings of the rows that a search found.

    Only the b x k passages move, see ``gather_rows``.

    Args:
      index: its arrays sharded as `placement.rows_sharding` says.
      result: rows to fetch; row -1 gives padding tokens and a False mask.
      mesh: mesh of the index; the active one if not given.

    Raises:
      ValueError: the mesh does not divide the rows; ``placement.to_device`` pads them.
    """
    arrays = {
        "reader": index.reader_tokens_nl,
        "retriever": index.retriever_tokens_nm,
        "embeddings": index.embeddings_ne,
        "apart": index.apart_nf,
    }
    held = {name: array for name, array in arrays.items() if array is not None}
    found = gather_rows(tuple(held.values()), result.rows_bk, mesh)
    taken = dict(zip(held, found, strict=True))
    return Passages(
        rows_bk=result.rows_bk,
        scores_bk=result.scores_bk,
        reader_tokens_bkl=taken["reader"],
        retriever_tokens_bkm=taken.get("retriever"),
        mask_bk=result.rows_bk != NO_ROW,
        embeddings_bke=jax.lax.stop_gradient(taken["embeddings"]),
        apart_bkf=taken.get("apart"),
    )


def gather_rows(
    arrays: tuple[Array, ...], rows_bk: Int[Array, "b k"], mesh: Mesh | None = None
) -> tuple[Shaped[Array, "b k _"], ...]:
    """Fetch rows of arrays that are sharded on axis n.

    Each device contributes the rows that it holds, and zeros for the others. The sum over the
    devices is the result, the same on every device of a slice.

    Args:
      arrays: each [n, x] or `Int8Rows`, sharded as `placement.rows_sharding` says.
      rows_bk: int32 rows to fetch; row -1 gives zeros.
      mesh: mesh of the arrays; the active one if not given.

    Returns:
      One [b, k, x] for each array; integers as int32, `Int8Rows` as float32.

    Raises:
      ValueError: the mesh does not divide the rows.
    """
    mesh = mesh_for(mesh, arrays[0].shape[0])
    if mesh is None:
        return _take_rows(arrays, rows_bk, 0)

    def take_shard(arrays: tuple[Array, ...], rows_bk: Array) -> tuple[Array, ...]:
        mine = _take_rows(arrays, rows_bk, first_row(mesh, arrays[0].shape[0]))
        return jax.lax.psum(mine, axes)

    axes, queries = index_axes(mesh), over_slices(mesh, rows_bk.shape[0])
    specs = (PartitionSpec(axes), queries)
    return jax.shard_map(take_shard, mesh=mesh, in_specs=specs, out_specs=queries)(arrays, rows_bk)


class ExactSearcher:
    """``exact_search`` behind the Searcher protocol, compiled once per k and shape."""

    def __init__(self, index: DeviceIndex, mesh: Mesh | None = None) -> None:
        """Search ``index``, which lies on ``mesh`` (the active one if not given)."""
        self.index = index
        self.count = int(index.count)
        mesh = mesh or active_mesh()
        self._search = jax.jit(functools.partial(exact_search, mesh=mesh), static_argnames="k")

    def search(
        self, query_be: Float[Array, "b e"], k: int, excluded_bx: Int[Array, "b x"] | None = None
    ) -> SearchResult:
        """See ``Searcher.search``."""
        check_k(k, self.count)
        return self._search(self.index, query_be, k=k, excluded_bx=excluded_bx)


def top_k_rows(
    scores_bn: Float[Array, "b n"], k: int, count: Int[Array, ""] | int
) -> tuple[Float[Array, "b {k}"], Int[Array, "b {k}"]]:
    """``jax.lax.top_k`` of the first ``count`` columns, in two stages: blocks, then rows.

    The k best rows lie in the k blocks with the best maxima (ties: lower block). Any other
    block is preceded by k blocks whose maxima all come before its own rows. So only k
    blocks have to be looked into. The block size is the largest power of two that divides
    n and stays under sqrt(n / k), which balances the two stages; for an odd n it is 1,
    one plain ``top_k``. ``placement.to_device`` pads n to a multiple of ``MAX_BLOCK``.

    Returns:
      Scores and int32 positions, both [b, k]; scores are -inf where ``count`` is below k.
    """
    b, n = scores_bn.shape
    block = MAX_BLOCK
    while block > 1 and (n % block or block * block * k > n):
        block //= 2
    if block == 1:
        real_bn = jnp.where(jnp.arange(n)[None] < count, scores_bn, -jnp.inf)
        top_bk, at_bk = jax.lax.top_k(real_bn, k)
        return top_bk, at_bk
    blocks = n // block
    scores_bgw = scores_bn.reshape(b, blocks, block)  # g blocks of w neighbouring rows
    # Maxima first, padding after: a mask on all scores would cost more than all the rest.
    # Only the block that `count` cuts through needs its maximum taken again.
    edge = jnp.clip(count // block, 0, blocks - 1)
    edge_1w = edge * block + jnp.arange(block)[None]
    edge_bw = jnp.where(edge_1w < count, scores_bgw[:, edge], -jnp.inf)
    block_1g = jnp.arange(blocks)[None]
    best_bg = jnp.where(block_1g < count // block, scores_bgw.max(axis=-1), -jnp.inf)
    best_bg = jnp.where(
        block_1g == edge, jnp.maximum(best_bg, edge_bw.max(axis=-1, keepdims=True)), best_bg
    )
    _, best_bk = jax.lax.top_k(best_bg, k)
    best_bk = jnp.sort(best_bk, axis=-1)  # candidates in row order: ties go to the lower row
    candidates_bkw = jnp.take_along_axis(scores_bgw, best_bk[:, :, None], axis=1)
    rows_bkw = best_bk[:, :, None] * block + jnp.arange(block, dtype=jnp.int32)[None, None]
    candidates_bkw = jnp.where(rows_bkw < count, candidates_bkw, -jnp.inf)
    top_bk, at_bk = jax.lax.top_k(candidates_bkw.reshape(b, k * block), k)
    return top_bk, jnp.take_along_axis(rows_bkw.reshape(b, k * block), at_bk, axis=1)


def _search_rows(
    first_row: Array | int,
    embeddings_ne: Array,
    count: Array,
    query_be: Array,
    excluded_bx: Array,
    k: int,
    recall_target: float,
) -> tuple[Array, Array]:
    """The k best rows of one shard, whose first row is ``first_row`` of the index."""
    n = embeddings_ne.shape[0]
    scores_bn = inner_products(query_be, embeddings_ne)
    # Up to x rows are excluded later, so x more are taken: k are left if the shard has them.
    c = min(k + excluded_bx.shape[1], n)
    if recall_target < 1.0:
        real_1n = jnp.arange(n)[None] < count - first_row
        real_bn = jnp.where(real_1n, scores_bn, -jnp.inf)
        top_bc, at_bc = jax.lax.approx_max_k(real_bn, c, recall_target=recall_target)
    else:
        top_bc, at_bc = top_k_rows(scores_bn, c, count - first_row)
    rows_bc = first_row + at_bc
    excluded_bc = (rows_bc[:, :, None] == excluded_bx[:, None, :]).any(axis=-1)
    scores_bk, best_bk = jax.lax.top_k(jnp.where(excluded_bc, -jnp.inf, top_bc), k)
    rows_bk = jnp.take_along_axis(rows_bc, best_bk, axis=1)
    return jnp.where(jnp.isneginf(scores_bk), NO_ROW, rows_bk), scores_bk


def _take_rows(
    arrays: tuple[Array, ...], rows_bk: Array, first_row: Array | int
) -> tuple[Array, ...]:
    """Entries of the rows that a shard holds, zeros for all others."""
    n = arrays[0].shape[0]
    local_bk = rows_bk - first_row
    held_bk1 = ((rows_bk != NO_ROW) & (local_bk >= 0) & (local_bk < n))[:, :, None]
    local_bk = jnp.clip(local_bk, 0, n - 1)

    def take(array: Any) -> Array:
        found = as_floats(jax.tree.map(lambda leaf: jnp.asarray(leaf)[local_bk], array))
        if jnp.issubdtype(found.dtype, jnp.integer):
            found = found.astype(jnp.int32)  # not every backend can sum 16 bit integers
        return jnp.where(held_bk1, found, 0)

    return tuple(take(array) for array in arrays)


def first_row(mesh: Mesh, shard_rows: int) -> Array:
    """Index row at which this device's shard begins (inside shard_map)."""
    return jax.lax.axis_index(index_axes(mesh)) * shard_rows


def mesh_for(mesh: Mesh | None, n: int) -> Mesh | None:
    """The mesh to search on, None for one device.

    Raises:
      ValueError: the mesh does not divide n.
    """
    mesh = mesh or active_mesh()
    if mesh is None or mesh.size == 1:
        return None
    if n % index_parts(mesh):
        raise ValueError(
            f"{n} index rows do not divide over the {index_parts(mesh)} devices of the mesh "
            f"{dict(mesh.shape)}; place the index with placement.to_device, which pads it"
        )
    return mesh
