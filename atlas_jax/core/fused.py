"""Fused attention: what a T5 or BERT attention reads, without its probabilities in memory.

The numbers are those of plain attention; the work is done by Pallas kernels for TPU
(`fused_kernels`). Elsewhere the kernels are interpreted, which is exact and very slow: it is for
tests. Queries, keys and values stay as the projections give them, [n, l, h c], so nothing is
transposed, and heads of 64 channels lie two by two in the 128 lanes of a TPU.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Shaped

from atlas_jax.core import fused_kernels as kernels
from atlas_jax.core.fused_layout import Layout, make_layout, tiles_of
from atlas_jax.core.partitioning import active_mesh, active_spec
from atlas_jax.core.types import Array

UNREAD = -1  # the segment of a position that nothing reads and that reads nothing


@flax.struct.dataclass
class Seen:
    """Which positions each position reads: those of its own segment.

    Attributes:
      q_segments: int32 [n, q], segments of the attending positions, `UNREAD` for padding.
      k_segments: int32 [n, s], likewise of the positions that are read.
      variants_nrs: bool [n, r, s], masks of r variants, whose attending positions lie side by
        side, q = r t. What is read must be of the segment and in the mask. None = segments say
        it all.
    """

    q_segments: Array
    k_segments: Array
    variants_nrs: Array | None = None

    @classmethod
    def of_source(cls, mask_nrs: Bool[Array, "n r s"], t: int) -> "Seen":
        """Targets of t positions, r for each source, that read what their mask shows."""
        n, r, _ = mask_nrs.shape
        any_ns = jnp.any(mask_nrs, axis=1)
        return cls(
            q_segments=jnp.zeros((n, r * t), jnp.int32),
            k_segments=jnp.where(any_ns, 0, UNREAD).astype(jnp.int32),
            variants_nrs=mask_nrs if r > 1 else None,
        )


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static about an attention: its heads, and where its arrays lie."""

    heads: int
    rows: Any  # mesh axes
    over: Any  # mesh axes of the heads
    mesh: Any
    interpret: bool

    @classmethod
    def of(cls, n: int, heads: int) -> "_Call":
        mesh = active_mesh()
        rows, over = active_spec((n, heads), "batch", "heads")
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        return cls(heads, rows, over, mesh, platform != "tpu")

    @property
    def arrays(self) -> PartitionSpec:
        """How arrays [n, l, h c] are sharded."""
        return PartitionSpec(self.rows, None, self.over)

    @property
    def sums(self) -> PartitionSpec:
        """How arrays [n, h, q] are sharded."""
        return PartitionSpec(self.rows, self.over)

    @property
    def distances(self) -> PartitionSpec:
        """How arrays [h, distances] are sharded."""
        return PartitionSpec(self.over)

    @property
    def row(self) -> PartitionSpec:
        """How arrays [n, ...] are sharded."""
        return PartitionSpec(self.rows)

    def local(self, function: Callable[..., Any], given: Any, gives: Any) -> Callable[..., Any]:
        """The function on each device's part of its arrays."""
        if self.mesh is None or self.mesh.size == 1:
            return function
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=given, out_specs=gives, check_vma=False
        )


def attend(
    q_nqe: Float[Array, "n q e"],
    k_nse: Float[Array, "n s e"],
    v_nse: Float[Array, "n s e"],
    seen: Seen,
    distances_hd: Float[Array, "h d"] | None,
    heads: int,
    factor_nhs: Float[Array, "n h s"] | None = None,
    weight_nq: Shaped[Array, "n q"] | None = None,
) -> tuple[Float[Array, "n q e"], Float[Array, "n s"] | None]:
    """Multi-head attention whose logits are q k + bias, unscaled; e = heads x channels.

    A position that sees nothing reads zeros. Gradients flow to queries, keys, values and biases.
    The mass has none.

    Args:
      q_nqe, k_nse, v_nse: as the projections give them, heads side by side.
      seen: who reads what.
      distances_hd: float32 biases by distance (key position minus query position), from
        -(q - 1) to s - 1; then q = s. None = no bias.
      heads: h.
      factor_nhs: float32, dropout of the probabilities with one mask for all queries: 0 where a
        key is dropped, else 1 / (1 - rate). None = no dropout.
      weight_nq: weights of the attending positions; asks for the mass. Not with a bias or
        variants.

    Returns:
      [n, q, e], and with weights float32 [n, s]: probability times the L2 norm of the value,
      averaged over heads, summed over weighted positions.
    """
    call = _Call.of(q_nqe.shape[0], heads)
    read, sums = _attend(call, q_nqe, k_nse, v_nse, seen, distances_hd, factor_nhs)
    if weight_nq is None:
        return read, None
    args = jax.lax.stop_gradient((q_nqe, k_nse, v_nse, seen, sums, weight_nq))
    given = (*[call.arrays] * 3, call.row, call.sums, call.row)
    return read, call.local(functools.partial(_local_mass, call), given, call.row)(*args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    call: _Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    distances: jax.Array | None,
    factor: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    return _attend_forward(call, q, k, v, seen, distances, factor)[0]


def _attend_forward(call: _Call, *arrays: Any) -> Any:
    given = (*[call.arrays] * 3, call.row, call.distances, call.sums)
    forward = call.local(functools.partial(_local_forward, call), given, (call.arrays, call.sums))
    read, sums = forward(*arrays)
    return (read, sums), (*arrays, read, sums)


def _attend_backward(call: _Call, saved: Any, cotangents: Any) -> Any:
    given = (*[call.arrays] * 3, call.row, call.distances, call.sums)
    given += (call.arrays, call.sums, call.arrays)
    gives = (*[call.arrays] * 3, call.distances)
    backward = call.local(functools.partial(_local_backward, call), given, gives)
    *d_arrays, d_distances = backward(*saved, cotangents[0])
    return (*d_arrays, None, d_distances, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _layout(
    q: jax.Array, k: jax.Array, seen: Seen, distances: Any, factor: Any, channels: int
) -> Layout:
    variants = 0 if seen.variants_nrs is None else seen.variants_nrs.shape[1]
    heads = q.shape[2] // channels
    return make_layout(
        q.shape, k.shape[1], heads, variants, distances is not None, factor is not None, q.dtype
    )


def _inputs(layout: Layout, q: Any, k: Any, v: Any, seen: Seen) -> tuple[Any, list[jax.Array]]:
    """The tiles, and queries, keys, values and masks, padded to whole tiles."""
    q_segments = _padded(seen.q_segments, layout.q, UNREAD)
    k_segments = _padded(seen.k_segments, layout.s, UNREAD)
    arrays = [_padded(q, layout.q), _padded(k, layout.s), _padded(v, layout.s)]
    arrays += [q_segments[:, None], k_segments[:, None]]
    if seen.variants_nrs is not None:
        masks = seen.variants_nrs.astype(jnp.bfloat16)
        arrays.append(jnp.pad(masks, ((0, 0), (0, 0), (0, layout.s - masks.shape[2]))))
    return tiles_of(q_segments, k_segments, layout.q_tile, layout.k_tile), arrays


def _padded(x: jax.Array, length: int, value: int = 0) -> jax.Array:
    """Pad axis 1."""
    more = length - x.shape[1]
    if not more:
        return x
    return jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)), constant_values=value)


def _wide(layout: Layout, distances: jax.Array | None) -> list[jax.Array]:
    """Biases by distance of padded positions, [groups, heads, 2 q], if there are any."""
    if distances is None:
        return []
    length = (distances.shape[1] + 1) // 2
    more = layout.q - length
    wide = jnp.pad(distances.astype(jnp.float32), ((0, 0), (more + 1, more)))
    return [wide.reshape(layout.groups, layout.heads, -1)]


def _factors(layout: Layout, factor: jax.Array | None) -> list[jax.Array]:
    """Factors of dropout of padded positions, [n, groups, heads, s], if there is any."""
    if factor is None:
        return []
    padded = jnp.pad(factor, ((0, 0), (0, 0), (0, layout.s - factor.shape[2])))
    return [padded.reshape(layout.rows, layout.groups, layout.heads, layout.s)]


def _local_forward(
    call: _Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    distances: jax.Array | None,
    factor: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    layout = _layout(q, k, seen, distances, factor, _channels(call, q))
    tiles, arrays = _inputs(layout, q, k, v, seen)
    arrays += _wide(layout, distances) + _factors(layout, factor)
    read, sums = kernels.forward(layout, tiles, arrays, call.interpret)
    return read[:, : q.shape[1]], sums.reshape(layout.rows, -1, layout.q)


def _local_backward(
    call: _Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    distances: jax.Array | None,
    factor: jax.Array | None,
    read: jax.Array,
    sums: jax.Array,
    d_read: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    layout = _layout(q, k, seen, distances, factor, _channels(call, q))
    tiles, arrays = _inputs(layout, q, k, v, seen)
    given = [_padded(d_read.astype(q.dtype), layout.q), _padded(read, layout.q)]
    given.append(sums.reshape(layout.rows, layout.groups, layout.heads, layout.q))
    given += arrays + _wide(layout, distances) + _factors(layout, factor)
    dq, dk, dv, *d_wide = kernels.backward(layout, tiles, given, call.interpret)
    s = k.shape[1]
    d_distances = None
    if distances is not None:
        length = q.shape[1]
        more = layout.q - length
        d_distances = d_wide[0].reshape(distances.shape[0], -1)
        d_distances = d_distances[:, more + 1 : more + 2 * length]
        if call.rows and call.mesh is not None and call.mesh.size > 1:
            d_distances = jax.lax.psum(d_distances, call.rows)
    return dq[:, : q.shape[1]], dk[:, :s], dv[:, :s], d_distances


def _local_mass(
    call: _Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    sums: jax.Array,
    weight_nq: jax.Array,
) -> jax.Array:
    layout = _layout(q, k, seen, None, None, _channels(call, q))
    tiles, arrays = _inputs(layout, q, k, v, seen)
    weight = _padded(weight_nq.astype(jnp.float32), layout.q)[:, None]
    given = [weight, sums.reshape(layout.rows, layout.groups, layout.heads, layout.q), *arrays]
    found = kernels.mass(layout, tiles, given, call.interpret)[:, 0, : k.shape[1]] / call.heads
    if call.over and call.mesh is not None and call.mesh.size > 1:
        found = jax.lax.psum(found, call.over)
    return found


def _channels(call: _Call, q: jax.Array) -> int:
    """Channels of a head, from a device's part of the queries."""
    parts = 1
    if call.over and call.mesh is not None:
        axes = (call.over,) if isinstance(call.over, str) else call.over
        for axis in axes:
            parts *= call.mesh.shape[axis]
    return int(q.shape[2]) * parts // call.heads
