"""Put an index from files or memory on the devices of a mesh."""

import math
import os
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from atlas_jax.core import multihost
from atlas_jax.core.partitioning import active_mesh, index_axes, index_parts
from atlas_jax.core.types import DeviceIndex
from atlas_jax.index.exact import MAX_BLOCK
from atlas_jax.index.int8 import abstract_rows
from atlas_jax.index.passages import PassageStore

# By default, a TPU's compiler stores a matrix by columns if its rows need padding to a multiple
# of 128. Each search would then copy all tokens before it takes its rows.
ROW_BY_ROW = Layout(major_to_minor=(0, 1))
_CHUNK_BYTES = 1 << 22
_ALIGNMENT = 64  # on the CPU, JAX uses an aligned array without a copy


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an index's arrays [n, x]: rows spread over the devices; each slice has all."""
    return NamedSharding(mesh, PartitionSpec(index_axes(mesh)))


def embeddings_layout(count: int, width: int, dtype: str, mesh: Mesh) -> Any:
    """Shape, type and sharding of the embeddings of ``count`` passages on the devices of a mesh."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows_sharding(mesh)),
        abstract_rows(padded_rows(count, index_parts(mesh)), width, dtype),
    )


def tokens_layout(count: int, width: int, dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Shape, type, sharding and layout of the tokens of ``count`` passages on a mesh's devices."""
    shape = (padded_rows(count, index_parts(mesh)), width)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=Format(ROW_BY_ROW, rows_sharding(mesh)))


def in_layout(array_nx: jax.Array, layout: Layout) -> jax.Array:
    """The array itself if it has this layout, else a copy that has it."""
    present: Any = array_nx.format  # type: ignore[attr-defined]
    if present.layout.major_to_minor == layout.major_to_minor:
        return array_nx
    wanted = Format(layout, array_nx.sharding)
    return jax.jit(_same, out_shardings=wanted)(array_nx)


def _same(array: jax.Array) -> jax.Array:
    """A named function, so that the copy is compiled once for a shape."""
    return array


def to_device(
    embeddings_ne: Any,
    store: PassageStore,
    mesh: Mesh | None = None,
    version: int = 0,
    retriever_tokens: bool = True,
    apart_nf: Any = None,
    capacity: int = 0,
) -> DeviceIndex:
    """Spread embeddings and tokens over the devices of a mesh; each slice has all of them.

    Rows are padded to a multiple of devices x ``exact.MAX_BLOCK``. Each host reads only the rows of
    its own devices, in chunks, so its memory never holds a second copy. A TPU holds one of the two
    token arrays twice for a moment (``in_layout``).

    Args:
      embeddings_ne: one row per passage: in memory, in files (``load_index``), or already
        on the devices in the layout of ``embeddings_layout``.
      store: the passages; its token arrays are placed too.
      mesh: the active one if not given; without any, one device holds everything.
      version: how often the embeddings have been refreshed.
      retriever_tokens: whether to place the tokens for the retriever. Only programs that embed
        passages anew read them.
      apart_nf: the reader's states of the passages, one row each, see ``DeviceIndex``.
      capacity: rows to have room for, if these are more than there are passages.

    Raises:
      ValueError: the numbers of embeddings and passages differ.
      UserError: the store's tokens are not those that its manifest describes.
    """
    on_host = not isinstance(jax.tree.leaves(embeddings_ne)[0], jax.Array)
    if on_host and embeddings_ne.shape[0] != store.count:
        raise ValueError(f"{embeddings_ne.shape[0]} embeddings for {store.count} passages")
    mesh = mesh or active_mesh()
    every: jax.sharding.Sharding = SingleDeviceSharding(jax.local_devices()[0])
    whole, shards = every, 1
    if mesh is not None:
        every, whole = rows_sharding(mesh), NamedSharding(mesh, PartitionSpec())
        shards = index_parts(mesh)
    padded = padded_rows(max(store.count, capacity), shards)

    def spread(array_nx: Any, tower: str = "") -> jax.Array:
        def shard(at: tuple[slice, ...] | None) -> np.ndarray:
            rows = at[0] if at else slice(None)
            read = _read_rows(array_nx, rows, padded)
            if tower:
                store.check_tokens(tower, read, rows.start or 0)
            return read

        return jax.make_array_from_callback((padded, *array_nx.shape[1:]), every, shard)

    def tokens(array_nx: Any, tower: str) -> jax.Array:
        return in_layout(spread(array_nx, tower), ROW_BY_ROW)

    def scalar(value: int) -> jax.Array:
        return multihost.place(np.int32(value), whole)

    return DeviceIndex(
        embeddings_ne=jax.tree.map(spread, embeddings_ne) if on_host else embeddings_ne,
        reader_tokens_nl=tokens(store.reader_tokens_nl, "reader"),
        retriever_tokens_nm=(
            tokens(store.retriever_tokens_nm, "retriever") if retriever_tokens else None
        ),
        count=scalar(store.count),
        version=scalar(version),
        apart_nf=None if apart_nf is None else spread(apart_nf),
    )


def padded_rows(count: int, shards: int) -> int:
    """Rows of an index of so many passages on so many devices."""
    block = shards * MAX_BLOCK
    return -(-count // block) * block


def _read_rows(array_nx: Any, rows: slice, padded: int) -> np.ndarray:
    """A copy of some rows in aligned memory, with zeros beyond the last one."""
    start, stop, _ = rows.indices(padded)
    real = max(start, min(stop, len(array_nx)))
    row_bytes = math.prod(array_nx.shape[1:]) * array_nx.dtype.itemsize
    raw = np.empty((stop - start) * row_bytes + _ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % _ALIGNMENT
    raw = raw[skip : skip + (stop - start) * row_bytes]
    shard = raw.view(array_nx.dtype).reshape(stop - start, *array_nx.shape[1:])
    shard[real - start :] = 0
    file_name = _mapped_file(array_nx)
    if file_name is not None and isinstance(array_nx, np.memmap):
        # Read, not copied from the memory map: its pages would count as memory beside the copy.
        with open(file_name, "rb", buffering=0) as file:
            file.seek(array_nx.offset + start * row_bytes)
            view = memoryview(raw.data)[: (real - start) * row_bytes]
            while view:
                view = view[file.readinto(view[:_CHUNK_BYTES]) or len(view) :]
    else:
        step = max(1, _CHUNK_BYTES // max(1, row_bytes))
        for at in range(start, real, step):
            end = min(at + step, real)
            shard[at - start : end - start] = array_nx[at:end]
    return shard


def _mapped_file(array_nx: Any) -> str | None:
    """The file that an array maps as a whole; None for a slice of such an array."""
    if not (isinstance(array_nx, np.memmap) and array_nx.filename):
        return None
    end = array_nx.offset + array_nx.nbytes
    whole = array_nx.flags.c_contiguous and os.path.getsize(array_nx.filename) == end
    return array_nx.filename if whole else None
