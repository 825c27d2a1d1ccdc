"""Single zarr arrays (version 2), in a folder or in an OCDBT database, read by TensorStore.

    <name>/.zarray        shape, chunks and type, as JSON
    <name>/0.0, 0.1, ...  one chunk each

TensorStore reads a missing chunk as zeros, without an error. Here it is an error, unless the writer
of the array leaves out chunks of zeros.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import tensorstore

from atlas_jax.core import bounds, strict_json
from atlas_jax.core.errors import UserError, one_line
from atlas_jax.core.memory import available
from atlas_jax.core.paths import check_fetched, check_folder_fetched
from atlas_jax.interop.tensors import BFLOAT16, Tensor

MANIFEST = "manifest.ocdbt"
_MOST_CHUNKS = 1 << 20


@dataclasses.dataclass(frozen=True)
class _Zarray:
    """The fields of `.zarray`."""

    zarr_format: int
    shape: list[bounds.Count]
    chunks: list[bounds.AtLeast1]
    dtype: str
    dimension_separator: Literal[".", "/"] = "."


class Store(Protocol):
    """A place for arrays."""

    def has(self, key: str) -> bool:
        """Whether there is a file, or an entry, of that name."""

    def read(self, key: str) -> bytes:
        """Content of a file or entry; OSError or ValueError if it is missing or damaged."""

    def spec(self, path: str) -> dict[str, Any]:
        """TensorStore's key-value store of what lies below a path."""

    def check(self, path: str, where: str) -> None:
        """Refuse a path that leads out of the store (UserError)."""

    def check_fetched(self, path: str) -> None:
        """Refuse pointers of git-lfs in the place of an array's files (UserError)."""


class Folder:
    """Arrays as folders of files."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet."""
        self._folder = folder

    def has(self, key: str) -> bool:
        """Whether there is such a file."""
        return (self._folder / key).is_file()

    def read(self, key: str) -> bytes:
        """A file's bytes."""
        check_fetched(self._folder / key)
        return (self._folder / key).read_bytes()

    def spec(self, path: str) -> dict[str, Any]:
        """See `Store`."""
        return {"driver": "file", "path": f"{(self._folder / path).resolve()}/"}

    def check(self, path: str, where: str) -> None:
        """See `Store`."""
        if self._folder.resolve() not in (self._folder / path).resolve().parents:
            raise UserError(f"{where}: refused: {path!r} lies outside of the folder")

    def check_fetched(self, path: str) -> None:
        """See `Store`."""
        check_folder_fetched(self._folder / path)


class Database:
    """Arrays in an OCDBT database: one key per file that a folder would have."""

    def __init__(self, folder: Path) -> None:
        """Read the list of keys.

        Raises:
          UserError: the database is damaged.
        """
        self._folder = folder
        try:
            self._store = tensorstore.KvStore.open(self.spec("")).result()
            self._keys = {key.decode() for key in self._store.list().result()}
        except ValueError as error:
            check_folder_fetched(folder)
            raise UserError(f"{folder}: the OCDBT database is damaged: {one_line(error)}") from None

    def has(self, key: str) -> bool:
        """Whether there is such a key."""
        return key in self._keys

    def read(self, key: str) -> bytes:
        """An entry's bytes."""
        if key not in self._keys:
            raise OSError(f"no entry {key}")
        return bytes(self._store.read(key).result().value)

    def spec(self, path: str) -> dict[str, Any]:
        """See `Store`."""
        base = {"driver": "file", "path": f"{self._folder.resolve()}/"}
        return {"driver": "ocdbt", "base": base, "path": f"{path}/" if path else ""}

    def check(self, path: str, where: str) -> None:
        """Keys lead nowhere else."""

    def check_fetched(self, path: str) -> None:
        """All arrays share the database's files."""
        check_folder_fetched(self._folder)


def _check_chunks(shape: list[int], chunks: list[int], itemsize: int) -> None:
    """Refuse chunks for which TensorStore would use up all memory (ValueError)."""
    told = f"shape {shape} in chunks {chunks}"
    if len(shape) != len(chunks) or any(c > max(n, 1) for n, c in zip(shape, chunks, strict=True)):
        raise ValueError(told)
    if math.prod(shape) * itemsize > available():
        raise ValueError(f"{told}: more than the memory holds")
    if math.prod(-(-n // c) for n, c in zip(shape, chunks, strict=True)) > _MOST_CHUNKS:
        raise ValueError(f"{told}: more than {_MOST_CHUNKS} chunks")


def read_array(
    store: Store,
    path: str,
    where: str,
    name: str,
    zeros_left_out: bool = False,
    announced: Sequence[int] | None = None,
) -> Tensor:
    """An array whose numbers are not read yet.

    Args:
      path: of the array in the store.
      where: beginning of an error message.
      name: name of the array in its source.
      zeros_left_out: whether the writer leaves out chunks that hold only zeros.
      announced: the array's shape in an index.

    Raises:
      UserError: `.zarray` is missing, damaged or of another shape, or a chunk is missing.
    """
    store.check(path, where)
    try:
        meta: _Zarray = strict_json.parse_as(store.read(f"{path}/.zarray"), _Zarray, where)
        if meta.zarr_format != 2:
            raise ValueError(f"zarr_format {meta.zarr_format}")
        shape, chunks = meta.shape, meta.chunks
        dtype = BFLOAT16 if meta.dtype == "bfloat16" else np.dtype(meta.dtype)
        _check_chunks(shape, chunks, dtype.itemsize)
        separator = meta.dimension_separator
    except (OSError, ValueError, TypeError, SyntaxError) as error:
        store.check_fetched(path)
        raise UserError(
            f"{where}: {path}/.zarray is absent or damaged: {one_line(error)}"
        ) from None
    if announced is not None and list(announced) != shape:
        raise UserError(f"{where}: the index says shape {list(announced)}, .zarray {shape}")
    grid = [range(-(-n // c)) for n, c in zip(shape, chunks, strict=True)]
    for at in () if zeros_left_out else itertools.product(*grid):
        chunk = f"{path}/{separator.join(map(str, at)) or '0'}"
        if not store.has(chunk):
            raise UserError(f"{where}: the chunk {chunk} is missing")

    def read(at: Any) -> np.ndarray:
        try:
            spec = {"driver": "zarr", "kvstore": store.spec(path)}
            return np.asarray(tensorstore.open(spec, read=True).result()[at].read().result())
        except (ValueError, RuntimeError, MemoryError) as error:
            store.check_fetched(path)
            raise UserError(f"{where}: cannot be read: {one_line(error)}") from None

    def read_slice(axis: int, i: int) -> np.ndarray:
        return read((slice(None),) * axis + (i,))

    return Tensor(tuple(shape), dtype, lambda: read(...), where, (name,), read_slice)
