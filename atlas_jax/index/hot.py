"""Change rows of an index on the devices, in place and without compiling anything anew.

The rows of a device index are its living passages, then room. So that it stays so, the place of a
deleted passage is taken by a new one, or by the last one. ``DeviceIndex.count`` then says how many
rows live; every search already leaves out what lies beyond. So no search can find a deleted row,
and none has to look at a mask of all rows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, Shaped

from atlas_jax.core import multihost
from atlas_jax.core.partitioning import index_parts
from atlas_jax.core.types import NO_ROW, DeviceIndex
from atlas_jax.index.exact import gather_rows
from atlas_jax.index.placement import padded_rows
from atlas_jax.index.rolling import replace_rows

GROWTH = 1.5  # of the capacity, when it is full
_BLOCK = 64  # rows written by one call of the compiled program
_COPIED = 4096  # rows that one call copies into a larger index


@dataclass(frozen=True)
class Moves:
    """What is written where, so that the living rows stay together.

    Attributes:
      rows_w: int32 rows to write.
      kept_w: row whose passage goes there, or -1 for a new one.
      fresh_w: number of the new passage that goes there; 0 where an old one does.
      count: living rows afterwards.
    """

    rows_w: np.ndarray
    kept_w: np.ndarray
    fresh_w: np.ndarray
    count: int


def moves(count: int, gone: Int[np.ndarray, " g"], fresh: int) -> Moves:
    """Plan a change of an index of ``count`` rows: some go, ``fresh`` passages come."""
    after = count - len(gone) + fresh
    holes = np.sort(gone)
    free = np.concatenate([holes[holes < after], np.arange(count, after)])
    tail = np.setdiff1d(np.arange(after, count), holes)  # living rows beyond the end
    assert len(free) == fresh + len(tail)
    return Moves(
        rows_w=free.astype(np.int32),
        kept_w=np.concatenate([np.full(fresh, NO_ROW), tail]).astype(np.int32),
        fresh_w=np.concatenate([np.arange(fresh), np.zeros(len(tail))]).astype(np.int32),
        count=after,
    )


def moved(
    places_n: Shaped[np.ndarray, " n"], fresh_r: Shaped[np.ndarray, " r"], plan: Moves
) -> Shaped[np.ndarray, " m"]:
    """What `moves` makes of an array of one entry a row, given the entries of new passages."""
    out = np.concatenate([places_n, np.zeros(max(0, plan.count - len(places_n)), places_n.dtype)])
    is_new = plan.kept_w == NO_ROW
    out[plan.rows_w[is_new]] = fresh_r[plan.fresh_w[is_new]]
    out[plan.rows_w[~is_new]] = places_n[plan.kept_w[~is_new]]
    return out[: plan.count]


class HotRows:
    """Writes rows of a device index; its programs are compiled once for a capacity.

    With several processes all must call the same methods, in the same order.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._jitted: dict[Callable[..., Any], Any] = {}  # by what is compiled
        self._nothing: dict[int, Any] = {}  # makes rows of zeros, by their number

    def capacity(self, index: DeviceIndex) -> int:
        """Rows that the index has room for."""
        return int(index.reader_tokens_nl.shape[0])

    def wider(self, index: DeviceIndex, count: int = 0) -> int:
        """Rows after the next growth, with room for ``count`` passages and more."""
        rows = int(self.capacity(index) * GROWTH)
        return padded_rows(rows if count <= rows else int(count * GROWTH), index_parts(self._mesh))

    def planned(self, index: DeviceIndex, rows: int) -> tuple[DeviceIndex, Callable[[], None]]:
        """The form of this index with so many rows, and what compiles for it.

        The form has shapes in place of arrays. The second result compiles what makes the index
        larger and what then writes rows; any thread may call it, and no device computes.
        """
        arrays = _arrays(index)
        small, wide = (_shapes(arrays, count) for count in (self.capacity(index), rows))
        nowhere = np.full(_BLOCK, NO_ROW, np.int32)
        values = jax.tree.map(lambda old: _taken(old, np.zeros(0), nowhere), arrays)
        zeros = self._zeros(arrays, rows)
        copied, written = (self._in_place(one, arrays) for one in (_copied, _written))

        def compile_all() -> None:
            zeros.lower().compile()
            copied.lower(wide, small, np.int32(0)).compile()
            written.lower(wide, nowhere, nowhere, values).compile()

        return _with(index, wide), compile_all

    def grown(self, index: DeviceIndex, rows: int) -> DeviceIndex:
        """A copy with room for so many rows, made on the devices a block after the other."""
        arrays = _arrays(index)
        wide, copy = self._zeros(arrays, rows)(), self._in_place(_copied, arrays)
        for start in range(0, self.capacity(index), _COPIED):
            wide = copy(wide, arrays, np.int32(start))
        return _with(index, jax.block_until_ready(wide))

    def _zeros(self, arrays: Any, rows: int) -> Any:
        if rows not in self._nothing:
            shapes = [((rows, *leaf.shape[1:]), leaf.dtype) for leaf in jax.tree.leaves(arrays)]
            structure = jax.tree.structure(arrays)
            self._nothing[rows] = jax.jit(
                lambda: jax.tree.unflatten(structure, [jnp.zeros(*one) for one in shapes]),
                out_shardings=_formats(arrays),
            )
        return self._nothing[rows]

    def _in_place(self, function: Callable[..., Any], arrays: Any) -> Any:
        """The jitted `_copied` or `_written`, which changes its first argument."""
        if function not in self._jitted:
            self._jitted[function] = jax.jit(
                functools.partial(function, mesh=self._mesh),
                donate_argnums=0,
                out_shardings=_formats(arrays),
            )
        return self._jitted[function]

    def write(self, index: DeviceIndex, plan: Moves, fresh: Any) -> DeviceIndex:
        """Apply a plan; the arrays of ``index`` are donated.

        Args:
          fresh: embeddings, reader tokens, retriever tokens and reader's states of the new
            passages, in the types of the index; None for what the index has not.
        """
        arrays = _arrays(index)
        write = self._in_place(_written, arrays)
        for start in range(0, len(plan.rows_w), _BLOCK):
            part = slice(start, start + _BLOCK)
            rows_w, kept_w = plan.rows_w[part], plan.kept_w[part]
            filled = _BLOCK - len(rows_w)
            # Rows beyond the capacity are written nowhere.
            rows_w = np.pad(rows_w, (0, filled), constant_values=self.capacity(index))
            kept_w = np.pad(kept_w, (0, filled), constant_values=NO_ROW)
            at = np.pad(plan.fresh_w[part], (0, filled))
            values = jax.tree.map(lambda old, new, at=at: _taken(old, new, at), arrays, fresh)
            arrays = write(arrays, rows_w, kept_w, values)
        count = multihost.place(np.int32(plan.count), index.count.sharding)
        return cast(DeviceIndex, _with(index, arrays).replace(count=count))  # type: ignore[attr-defined]


def _taken(old: jax.Array, new: np.ndarray, at: np.ndarray) -> np.ndarray:
    if not len(new):
        return np.zeros((len(at), *old.shape[1:]), old.dtype)
    return np.asarray(new[at], old.dtype)


def _shapes(arrays: Any, rows: int) -> Any:
    def shape(array: jax.Array) -> jax.ShapeDtypeStruct:
        form: Any = array.format  # type: ignore[attr-defined]
        return jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype, sharding=form)

    return jax.tree.map(shape, arrays)


def _formats(arrays: Any) -> Any:
    return jax.tree.map(lambda array: array.format, arrays)


def _gathered(array: jax.Array, rows_w: jax.Array, mesh: Mesh) -> jax.Array:
    """Rows of an array [n] or [n, x] that lies over all devices."""
    table = array if array.ndim == 2 else array[:, None]
    (found_1wx,) = gather_rows((table,), rows_w[None], mesh)
    return found_1wx[0].reshape(-1, *array.shape[1:]).astype(array.dtype)


def _copied(wide: Any, arrays: Any, start: jax.Array, mesh: Mesh) -> Any:
    """The larger arrays with a block of rows of the smaller ones; rows beyond these are zeros."""
    rows_w = start + jnp.arange(_COPIED, dtype=jnp.int32)

    def copy(new: jax.Array, old: jax.Array) -> Any:
        return replace_rows(new, rows_w, _gathered(old, rows_w, mesh), mesh)

    return jax.tree.map(copy, wide, arrays)


def _written(arrays: Any, rows_w: jax.Array, kept_w: jax.Array, values: Any, mesh: Mesh) -> Any:
    def write(old: jax.Array, new: jax.Array) -> Any:
        kept = _gathered(old, kept_w, mesh)
        is_kept = (kept_w != NO_ROW).reshape(-1, *(1,) * (new.ndim - 1))
        return replace_rows(old, rows_w, jnp.where(is_kept, kept, new), mesh)

    return jax.tree.map(write, arrays, values)


def _arrays(index: DeviceIndex) -> Any:
    return (
        index.embeddings_ne,
        index.reader_tokens_nl,
        index.retriever_tokens_nm,
        index.apart_nf,
    )


def _with(index: DeviceIndex, arrays: Any) -> DeviceIndex:
    embeddings_ne, reader_tokens_nl, retriever_tokens_nm, apart_nf = arrays
    changed = index.replace(  # type: ignore[attr-defined]
        embeddings_ne=embeddings_ne,
        reader_tokens_nl=reader_tokens_nl,
        retriever_tokens_nm=retriever_tokens_nm,
        apart_nf=apart_nf,
    )
    return cast(DeviceIndex, changed)
