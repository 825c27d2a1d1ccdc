"""Pallas kernels of fused attention for TPU: logits and probabilities never leave the chip.

One step of a grid takes a tile of attending positions, one of read positions and a group of heads.
The forward kernel keeps a running maximum and sum of the exponentials (online softmax, arXiv
2205.14135), so that no row of logits has to be whole. The backward kernel computes the
probabilities again from the logarithm of the sum. Statistics and sums are float32.

The position bias of a tile depends on distances alone. It is made once for each group of heads,
from the biases by distance, by a shear: row r is shifted by r, one bit of r after the other. The
gradient by distance is the opposite shear of a sum over all rows n.
"""

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from atlas_jax.core.fused_layout import LANES, Block, Layout, Tiles, vmem

HIDDEN = -1e30  # a logit that no exponential sees; also of a row that sees nothing so far
USUAL_VMEM = 16 << 20  # what the compiler gives a kernel that does not ask
# The logarithmic sum of a row that sees nothing: its probabilities are then 0.
NOTHING = 1e30


def forward(
    layout: Layout, tiles: Tiles, arrays: Sequence[jax.Array], interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """What is read, [n, q, h c], and the logarithms of the sums, float32 [n, groups, heads, q].

    Args:
      arrays: queries, keys, values, then those of `Layout.masks` and `Layout.extras`.
    """
    inputs = [layout.queries(), layout.keys(), layout.keys(), *layout.masks, *layout.extras]
    tile, heads = layout.q_tile, layout.heads
    scratch = [
        ((heads, tile, layout.channels), jnp.float32),
        ((heads, tile, 1), jnp.float32),
        ((heads, tile, 1), jnp.float32),
        *([(layout.spread, jnp.float32)] if layout.bias else []),
    ]
    outputs = [layout.queries(), layout.statistics]
    work = _Work(layout, "hnij", inputs, outputs, scratch, layout.products(2))
    statistics = (layout.rows, layout.groups, heads, layout.q)
    shapes = [arrays[0].shape, statistics]
    read, sums = work.run(functools.partial(_forward, layout), tiles, arrays, shapes, interpret)
    return read, sums


def backward(
    layout: Layout, tiles: Tiles, arrays: Sequence[jax.Array], interpret: bool
) -> list[jax.Array]:
    """Gradients of queries, keys and values, and float32 of the biases by distance if there are.

    Args:
      arrays: the gradient of what was read, what was read, the logarithms of the sums, then those
        of `forward`.
    """
    bias = [layout.distances] if layout.bias else []
    inputs = [layout.queries(), layout.queries(), layout.statistics]
    inputs += [layout.queries(), layout.keys(), layout.keys(), *layout.masks, *layout.extras]
    outputs = [layout.whole_queries, layout.keys(skips=False), layout.keys(skips=False), *bias]
    shape = (layout.heads, layout.k_tile, layout.channels)
    scratch = [
        ((layout.heads, layout.q, layout.channels), jnp.float32),
        (shape, jnp.float32),
        (shape, jnp.float32),
        *([(layout.spread, jnp.float32)] * 2 if layout.bias else []),
    ]
    work = _Work(layout, "hnji", inputs, outputs, scratch, layout.products(5))
    q, k, v = arrays[3:6]
    distances = (layout.groups, layout.heads, 2 * layout.q)
    shapes = [q.shape, k.shape, v.shape, *([distances] if layout.bias else [])]
    return work.run(functools.partial(_backward, layout), tiles, arrays, shapes, interpret)


def mass(layout: Layout, tiles: Tiles, arrays: Sequence[jax.Array], interpret: bool) -> jax.Array:
    """Probability times the norm of the value, summed over heads and weighted positions, [n, 1, s].

    Args:
      arrays: weights of the attending positions float32 [n, 1, q], the logarithms of the sums,
        then queries, keys, values and masks.
    """
    inputs = [layout.per_query(jnp.float32), layout.statistics]
    inputs += [layout.queries(), layout.keys(), layout.keys(), *layout.masks]
    outputs = [layout.per_key(jnp.float32, skips=False)]
    pairs, width = layout.rows * layout.s, layout.groups * layout.heads
    more = 2 * pairs * width * 8 * (layout.q + layout.q // layout.q_tile * layout.channels)
    work = _Work(layout, "njhi", inputs, outputs, [], layout.products(1) + more)
    shapes = [(layout.rows, 1, layout.s)]
    (found,) = work.run(functools.partial(_mass, layout), tiles, arrays, shapes, interpret)
    return found


class _Work:
    """A kernel's blocks, and what it costs."""

    def __init__(
        self,
        layout: Layout,
        order: str,
        inputs: Sequence[Block],
        outputs: Sequence[Block],
        scratch: Sequence[tuple[tuple[int, ...], Any]],
        flops: int,
    ) -> None:
        self.order, self.inputs, self.outputs, self.scratch = order, inputs, outputs, scratch
        self.sizes = layout.sizes
        self.vmem = vmem(layout, [*inputs, *outputs], scratch)
        moved = sum(one.bytes_moved(order, self.sizes) for one in (*inputs, *outputs))
        self.cost = pl.CostEstimate(
            flops=flops, transcendentals=layout.logits, bytes_accessed=moved
        )

    def run(
        self,
        kernel: Callable[..., None],
        tiles: Tiles,
        arrays: Sequence[jax.Array],
        shapes: Sequence[tuple[int, ...]],
        interpret: bool,
    ) -> list[jax.Array]:
        """The kernel's results of these shapes."""
        grid = tuple(self.sizes[axis] for axis in self.order)
        call = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(tiles),
                grid=grid,
                in_specs=[one.spec(self.order) for one in self.inputs],
                out_specs=[one.spec(self.order) for one in self.outputs],
                scratch_shapes=[pltpu.VMEM(*one) for one in self.scratch],
            ),
            out_shape=[
                jax.ShapeDtypeStruct(shape, one.dtype)
                for shape, one in zip(shapes, self.outputs, strict=True)
            ],
            compiler_params=pltpu.CompilerParams(
                # Only the first axis may be split over the cores of a chip: the others share sums.
                dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
                vmem_limit_bytes=max(USUAL_VMEM, self.vmem + self.vmem // 4),
            ),
            cost_estimate=self.cost,
            interpret=interpret,
        )
        found: list[jax.Array] = call(*tiles, *arrays)
        return found


def _named(layout: Layout, names: Sequence[str], refs: Sequence[Any]) -> Any:
    """References by name: those of `Layout.masks` and `Layout.extras`; BIAS_x is x with a bias."""
    masks = ["q_segments", "k_segments", *(["variants"] if layout.variants else [])]
    extras = ["distances"] * layout.bias + ["factors"] * layout.dropout
    found: list[str] = list(Tiles._fields)
    for name in names:
        if name == "MASKS":
            found += masks
        elif name == "EXTRAS":
            found += extras
        elif not name.startswith("BIAS_"):
            found.append(name)
        elif layout.bias:
            found.append(name.removeprefix("BIAS_"))
    named = SimpleNamespace(**dict(zip(found, refs, strict=True)))
    named.tiles = Tiles(*refs[: len(Tiles._fields)])
    return named


_FORWARD = "q k v MASKS EXTRAS read sums acc top total BIAS_spread".split()


def _forward(layout: Layout, *refs: Any) -> None:
    of = _named(layout, _FORWARD, refs)
    n, i, j = (pl.program_id(axis) for axis in (1, 2, 3))

    if layout.bias:
        _spread_once(layout, of, (n == 0) & (i == 0) & (j == 0))

    @pl.when(j == 0)
    def _start() -> None:
        of.acc[...] = jnp.zeros_like(of.acc)
        of.top[...] = jnp.full_like(of.top, HIDDEN)
        of.total[...] = jnp.zeros_like(of.total)

    @pl.when(of.tiles.meet(n, i, j))
    def _step() -> None:
        visible = _visible(layout, of, i)
        for g in range(layout.heads):
            bias = of.spread[_apart(layout, i, j), g] if layout.bias else None
            logits = _logits(layout, of, g, bias, visible)
            top = jnp.maximum(of.top[g], jnp.max(logits, axis=1, keepdims=True))
            # Of a row that sees nothing yet, all exponentials become 0.
            base = jnp.where(top == HIDDEN, 0.0, top)
            probs = jnp.exp(logits - base)
            before = jnp.exp(of.top[g] - base)
            of.top[g] = top
            of.total[g] = before * of.total[g] + jnp.sum(probs, axis=1, keepdims=True)
            value = _head(layout, of.v, g)
            dropped = _dropped(layout, of, g, probs).astype(value.dtype)
            of.acc[g] = before * of.acc[g] + _dot(dropped, value, 1, 0)

    @pl.when(j == layout.sizes["j"] - 1)
    def _end() -> None:
        for g in range(layout.heads):
            total = of.total[g]
            seen = jnp.where(total == 0.0, 1.0, total)
            _put(layout, of.read, g, of.acc[g] / seen)
            sums = jnp.where(total == 0.0, NOTHING, of.top[g] + jnp.log(seen))
            of.sums[0, 0, pl.ds(g, 1)] = _as_row(sums)


_BACKWARD = (
    "d_read read sums q k v MASKS EXTRAS dq dk dv BIAS_d_distances dq_acc dk_acc dv_acc "
    "BIAS_spread BIAS_d_spread"
).split()


def _backward(layout: Layout, *refs: Any) -> None:
    of = _named(layout, _BACKWARD, refs)
    n, j, i = (pl.program_id(axis) for axis in (1, 2, 3))
    sizes = layout.sizes
    first = (i == 0) & (j == 0)
    last = (i == sizes["i"] - 1) & (j == sizes["j"] - 1)

    if layout.bias:
        _spread_once(layout, of, (n == 0) & first)

        @pl.when((n == 0) & first)
        def _start_bias() -> None:
            of.d_spread[...] = jnp.zeros_like(of.d_spread)

    @pl.when(first)
    def _start_queries() -> None:
        of.dq_acc[...] = jnp.zeros_like(of.dq_acc)

    @pl.when(i == 0)
    def _start_keys() -> None:
        of.dk_acc[...] = jnp.zeros_like(of.dk_acc)
        of.dv_acc[...] = jnp.zeros_like(of.dv_acc)

    @pl.when(of.tiles.meet(n, i, j))
    def _step() -> None:
        visible = _visible(layout, of, i)
        for g in range(layout.heads):
            _step_back(layout, of, g, visible, i, _apart(layout, i, j))

    @pl.when(i == sizes["i"] - 1)
    def _end_keys() -> None:
        for g in range(layout.heads):
            _put(layout, of.dk, g, of.dk_acc[g])
            _put(layout, of.dv, g, of.dv_acc[g])

    @pl.when(last)
    def _end_queries() -> None:
        for g in range(layout.heads):
            _put(layout, of.dq, g, of.dq_acc[g])

    if layout.bias:

        @pl.when(last & (n == sizes["n"] - 1))
        def _end_bias() -> None:
            _gather_once(layout, of)


def _step_back(
    layout: Layout, of: Any, g: int, visible: jax.Array, i: jax.Array, apart: jax.Array
) -> None:
    """Add to the gradients what a pair of tiles gives for one head."""
    logits = _logits(layout, of, g, of.spread[apart, g] if layout.bias else None, visible)
    probs = jnp.exp(logits - _as_column(of.sums[0, 0, pl.ds(g, 1)]))
    query, key, value, d_read = (_head(layout, ref, g) for ref in (of.q, of.k, of.v, of.d_read))
    read = _head(layout, of.read, g).astype(jnp.float32)
    total = jnp.sum(read * d_read.astype(jnp.float32), axis=1, keepdims=True)
    d_logits = probs * (_dropped(layout, of, g, _dot(d_read, value, 1, 1)) - total)
    of.dv_acc[g] += _dot(_dropped(layout, of, g, probs).astype(d_read.dtype), d_read, 0, 0)
    if layout.bias:
        of.d_spread[apart, g] += d_logits
    d_logits = d_logits.astype(query.dtype)
    of.dk_acc[g] += _dot(d_logits, query, 0, 0)
    here = pl.ds(pl.multiple_of(i * layout.q_tile, layout.q_tile), layout.q_tile)
    of.dq_acc[g, here] += _dot(d_logits, key, 1, 0)


_MASS = "weight sums q k v MASKS mass".split()


def _mass(layout: Layout, *refs: Any) -> None:
    of = _named(layout, _MASS, refs)
    n, j, h, i = (pl.program_id(axis) for axis in range(4))

    @pl.when((h == 0) & (i == 0))
    def _start() -> None:
        of.mass[...] = jnp.zeros_like(of.mass)

    @pl.when(of.tiles.meet(n, i, j))
    def _step() -> None:
        visible = _visible(layout, of, i)
        for g in range(layout.heads):
            logits = _logits(layout, of, g, None, visible)
            probs = jnp.exp(logits - _as_column(of.sums[0, 0, pl.ds(g, 1)]))
            weight = jnp.broadcast_to(of.weight[0], (8, layout.q_tile))
            total = _dot(weight, probs, 1, 0, exact=True)
            value = _head(layout, of.v, g).astype(jnp.float32)
            ones = jnp.ones((8, layout.channels), jnp.float32)
            norm = jnp.sqrt(_dot(ones, value * value, 1, 1, exact=True))
            of.mass[0] += (total * norm)[:1]


def _head(layout: Layout, ref: Any, g: int) -> jax.Array:
    """The channels of a head in a block [1, positions, heads c]."""
    c = layout.channels
    found: jax.Array = ref[0, :, g * c : (g + 1) * c]
    return found


def _put(layout: Layout, ref: Any, g: int, value: jax.Array) -> None:
    c = layout.channels
    ref[0, :, g * c : (g + 1) * c] = value.astype(ref.dtype)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, exact: bool = False) -> jax.Array:
    """The product over an axis of each, summed in float32."""
    return jax.lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if exact else None,
    )  # fmt: skip


def _apart(layout: Layout, i: jax.Array, j: jax.Array) -> jax.Array:
    """How far tile j is from tile i, counted from the most negative distance."""
    return j - i + layout.sizes["i"] - 1


def _logits(
    layout: Layout, of: Any, g: int, bias: jax.Array | None, visible: jax.Array
) -> jax.Array:
    """Float32 [q tile, k tile]; `HIDDEN` where nothing is seen."""
    logits = _dot(_head(layout, of.q, g), _head(layout, of.k, g), 1, 1)
    return jnp.where(visible, logits if bias is None else logits + bias, HIDDEN)


def _dropped(layout: Layout, of: Any, g: int, x: jax.Array) -> jax.Array:
    """Probabilities, or the gradients of what became of them, with dropout by key."""
    return x * of.factors[0, 0, pl.ds(g, 1)] if layout.dropout else x


def _visible(layout: Layout, of: Any, i: jax.Array) -> jax.Array:
    """Which positions of the tile of keys each attending position reads, bool."""
    shape = (layout.q_tile, layout.k_tile)
    of_query = jnp.broadcast_to(_as_column(of.q_segments[0]), shape)
    of_key = jnp.broadcast_to(of.k_segments[0], shape)
    visible = (of_query == of_key) & (of_key >= 0)
    if not layout.variants:
        return visible
    place = (layout.q_tile, layout.variants)
    query = jax.lax.broadcasted_iota(jnp.int32, place, 0) + i * layout.q_tile
    start = jax.lax.broadcasted_iota(jnp.int32, place, 1) * layout.repeat
    own = (query >= start) & (query < start + layout.repeat)
    return visible & (_dot(own.astype(jnp.bfloat16), of.variants[0], 1, 0) > 0.5)


def _spread_once(layout: Layout, of: Any, when: jax.Array) -> None:
    """Make the biases of all tiles of a group of heads."""

    @pl.when(when)
    def _spread() -> None:
        for apart in range(layout.spread[0]):
            for g in range(layout.heads):
                row = of.distances[0, pl.ds(g, 1), _window(layout, apart)]
                whole = jnp.broadcast_to(row, (layout.q_tile, row.shape[1]))
                # Entry x of the window is for distance x - tile of the first row's first key.
                of.spread[apart, g] = _shear(whole, 1)[:, layout.q_tile :]


def _gather_once(layout: Layout, of: Any) -> None:
    """Sum the gradients of all tiles by distance; the opposite of the spread."""
    of.d_distances[...] = jnp.zeros_like(of.d_distances)
    for apart in range(layout.spread[0]):
        for g in range(layout.heads):
            tile = of.d_spread[apart, g]
            wide = _shear(jnp.concatenate([jnp.zeros_like(tile), tile], axis=1), -1)
            summed = jnp.sum(wide, axis=0, keepdims=True)
            of.d_distances[0, pl.ds(g, 1), _window(layout, apart)] += summed


def _window(layout: Layout, apart: int) -> Any:
    """Where the distances of two tiles are; `apart` counts from the most negative distance."""
    tile = layout.q_tile
    return pl.ds(apart * tile, 2 * tile)


def _shear(x: jax.Array, direction: int) -> jax.Array:
    """Rotate row r by r to the right (1) or left (-1)."""
    rows, width = x.shape
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    step = 1
    while step < rows:
        turned = pltpu.roll(x, step if direction > 0 else width - step, axis=1)
        x = jnp.where((row & step) != 0, turned, x)
        step *= 2
    return x


def _as_column(row: jax.Array) -> jax.Array:
    """[1, m] -> [m, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _as_row(column: jax.Array) -> jax.Array:
    """[m, 1] -> [1, m]."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]
