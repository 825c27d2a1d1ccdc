"""How the kernels of fused attention cut their arrays, and what that costs.

Each array is cut into blocks, and the grid of a kernel walks over four axes:

    h  groups of heads, side by side in 128 lanes
    n  rows
    i  tiles of attending positions
    j  tiles of the positions that are read

A `Block` says which axis of the grid counts along which axis of an array. From that follow the
kernel's block specs, the bytes that it moves and the on-chip memory that it takes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

LANES, SUBLANES = 128, 16  # of a tile of bfloat16
TILE = 512  # positions of a tile at most
STEP_TILES = 6  # float32 arrays of a tile of logits that a step holds at once


class Block(NamedTuple):
    """One block of an array.

    Attributes:
      shape: of the block.
      axes: for each of its axes the letter of the grid axis that counts blocks, or None if the
        block has all of it.
      dtype: of the array.
      skips: whether a tile of keys without anything to read is not fetched.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Any
    skips: bool = False

    def spec(self, order: str) -> pl.BlockSpec:
        """For a grid whose axes have these letters in order, with `Tiles` as prefetched scalars."""

        def index(*args: Any) -> tuple[Any, ...]:
            at, tiles = dict(zip(order, args, strict=False)), args[len(order) :]
            if self.skips:
                at["j"] = tiles[NEAR][at["n"], at["j"]]
            return tuple(0 if axis is None else at[axis] for axis in self.axes)

        return pl.BlockSpec(self.shape, index)

    def bytes_moved(self, order: str, sizes: Mapping[str, int]) -> int:
        """Bytes between HBM and chip: a block moves again when its place in the array changes."""
        inner = max((order.index(a) for a in self.axes if a and sizes[a] > 1), default=-1)
        times = math.prod(sizes[axis] for axis in order[: inner + 1])
        return times * math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def vmem(self) -> int:
        """Bytes on the chip: two copies, of which one is filled while the other is used."""
        return 2 * padded_bytes(self.shape, self.dtype)


class Tiles(NamedTuple):
    """What a kernel knows of its tiles beforehand, int32, each [n, tiles].

    A tile of attending positions and one of read positions can meet if the ranges of their
    segments overlap. Without a real position, `low` is above `high`.

    Attributes:
      q_low, q_high, k_low, k_high: smallest and largest segment of a tile.
      near: the tile of keys that is fetched: the tile itself, or the last one before it that
        has something to read.
    """

    q_low: Any
    q_high: Any
    k_low: Any
    k_high: Any
    near: Any

    def meet(self, n: Any, i: Any, j: Any) -> Any:
        """Whether tile i of row n has to look at tile j."""
        return (self.q_low[n, i] <= self.k_high[n, j]) & (self.k_low[n, j] <= self.q_high[n, i])


NEAR = Tiles._fields.index("near")


def tiles_of(q_segments: jax.Array, k_segments: jax.Array, q_tile: int, k_tile: int) -> Tiles:
    """The tiles of segments [n, q] and [n, s]; a segment below 0 is not real."""

    def ranges(segments: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
        cut = segments.reshape(segments.shape[0], -1, tile)
        largest = jnp.iinfo(jnp.int32).max
        return jnp.min(jnp.where(cut < 0, largest, cut), -1), jnp.max(cut, -1)

    k_low, k_high = ranges(k_segments, k_tile)
    here = jnp.arange(k_low.shape[1], dtype=jnp.int32)[None]
    near = jax.lax.cummax(jnp.where(k_high < 0, 0, here), axis=1)
    return Tiles(*ranges(q_segments, q_tile), k_low, k_high, near)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one attention on one device, padded to whole tiles.

    Attributes:
      rows: n.
      q, s: attending and read positions.
      q_tile, k_tile: positions of a tile.
      groups, heads: groups of heads, and heads in each.
      channels: of a head.
      variants: r, the masks of a row, or 0 where segments say it all.
      repeat: attending positions of each variant.
      bias: whether there is a bias by distance; then q = s and the tiles are equal.
      dropout: whether probabilities have factors.
      dtype: of queries, keys and values.
    """

    rows: int
    q: int
    s: int
    q_tile: int
    k_tile: int
    groups: int
    heads: int
    channels: int
    variants: int
    repeat: int
    bias: bool
    dropout: bool
    dtype: Any

    @property
    def sizes(self) -> dict[str, int]:
        """Steps along each axis of the grid."""
        i, j = self.q // self.q_tile, self.s // self.k_tile
        return {"h": self.groups, "n": self.rows, "i": i, "j": j}

    @property
    def spread(self) -> tuple[int, ...]:
        """Shape of the biases of all tiles; tiles at the same distance share one."""
        apart = 2 * (self.q // self.q_tile) - 1
        return (apart, self.heads, self.q_tile, self.k_tile)

    def queries(self, dtype: Any = None) -> Block:
        """A tile of [n, q, h c]."""
        return self._positions(self.q_tile, "i", dtype)

    def keys(self, dtype: Any = None, skips: bool = True) -> Block:
        """A tile of [n, s, h c]; one that is written has to be written even if it is empty."""
        return self._positions(self.k_tile, "j", dtype)._replace(skips=skips)

    def _positions(self, tile: int, axis: str, dtype: Any) -> Block:
        width = self.heads * self.channels
        return Block((1, tile, width), ("n", axis, "h"), dtype or self.dtype)

    @property
    def whole_queries(self) -> Block:
        """All positions of a row of [n, q, h c]."""
        return Block((1, self.q, self.heads * self.channels), ("n", None, "h"), self.dtype)

    @property
    def statistics(self) -> Block:
        """A tile of the logits' logarithmic sums, [n, groups, heads, q]."""
        return Block((1, 1, self.heads, self.q_tile), ("n", "h", None, "i"), jnp.float32)

    @property
    def distances(self) -> Block:
        """The biases by distance of a group of heads, [groups, heads, 2 q]."""
        return Block((1, self.heads, 2 * self.q), ("h", None, None), jnp.float32)

    @property
    def factors(self) -> Block:
        """Factors of dropout of a tile of read positions, [n, groups, heads, s]."""
        shape = (1, 1, self.heads, self.k_tile)
        return Block(shape, ("n", "h", None, "j"), jnp.float32, True)

    @property
    def extras(self) -> list[Block]:
        """Biases and factors of dropout, if there are any; they follow the masks."""
        bias = [self.distances] if self.bias else []
        return [*bias, *([self.factors] if self.dropout else [])]

    def per_query(self, dtype: Any) -> Block:
        """A tile of numbers of attending positions, [n, 1, q]."""
        return Block((1, 1, self.q_tile), ("n", None, "i"), dtype)

    def per_key(self, dtype: Any, skips: bool = True) -> Block:
        """A tile of numbers of read positions, [n, 1, s]."""
        return Block((1, 1, self.k_tile), ("n", None, "j"), dtype, skips)

    @property
    def masks(self) -> list[Block]:
        """Segments of attending and read positions, and the masks of variants if there are any."""
        blocks = [self.per_query(jnp.int32), self.per_key(jnp.int32)]
        if self.variants:
            shape = (1, self.variants, self.k_tile)
            blocks.append(Block(shape, ("n", None, "j"), jnp.bfloat16, True))
        return blocks

    def products(self, count: int) -> int:
        """FLOPs of so many products of a tile of queries and one of keys, over the whole grid."""
        pairs = self.rows * self.q * self.s
        mask = 2 * pairs * self.groups * self.variants  # spreads the variants' masks
        return 2 * count * pairs * self.groups * self.heads * self.channels + mask

    @property
    def logits(self) -> int:
        """Number of logits, with padding."""
        return self.rows * self.groups * self.heads * self.q * self.s


def make_layout(
    q_shape: Sequence[int],
    s: int,
    heads: int,
    variants: int,
    bias: bool,
    dropout: bool,
    dtype: Any,
) -> Layout:
    """The layout of queries [n, q, h c] and s read positions."""
    n, q, width = q_shape
    channels = width // heads
    together = next(
        (g for g in range(1, heads + 1) if heads % g == 0 and g * channels % LANES == 0), heads
    )
    # The biases of all tiles are kept, and their size is length x tile.
    k_tile = _tile(s, max(LANES, TILE // 2) if bias and s > TILE else TILE)
    q_tile = k_tile if bias else _tile(q, TILE)
    return Layout(
        rows=n,
        q=-(-q // q_tile) * q_tile,
        s=-(-s // k_tile) * k_tile,
        q_tile=q_tile,
        k_tile=k_tile,
        groups=heads // together,
        heads=together,
        channels=channels,
        variants=variants,
        repeat=q // variants if variants else 0,
        bias=bias,
        dropout=dropout,
        dtype=jnp.dtype(dtype),
    )


def _tile(length: int, most: int) -> int:
    """One tile if it is not longer than `most`; else the one that needs the least padding."""
    if length <= most:
        return -(-length // SUBLANES) * SUBLANES
    return min((most, max(LANES, most // 2)), key=lambda tile: -(-length // tile) * tile)


def vmem(
    layout: Layout, blocks: Sequence[Block], scratch: Sequence[tuple[tuple[int, ...], Any]]
) -> int:
    """On-chip bytes of a kernel: its blocks, its scratch, and the logits of one step.

    A step holds about six arrays of a tile of logits: logits, probabilities, their gradients.
    """
    values = STEP_TILES * padded_bytes((layout.q_tile, layout.k_tile), jnp.float32)
    kept = sum(padded_bytes(*one) for one in scratch)
    return sum(one.vmem for one in blocks) + kept + values


def padded_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Bytes of an array on the chip, whose last two axes are padded to whole registers."""
    size = jnp.dtype(dtype).itemsize
    *outer, rows, lanes = (1, 1, *shape)
    rows = -(-rows // (32 // size)) * (32 // size)
    return int(np.prod(outer, dtype=np.int64)) * rows * (-(-lanes // LANES) * LANES) * size
