"""The embeddings of a store on disk.

A saved index is a folder with `index.json` and the array that it names, and for 8 bits the
scales beside it. The array of a new version is written beside the old one; then `index.json` is
replaced in one step. So an error or a kill at any time leaves the previous version usable.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import atomic_text
from atlas_jax.core.locks import locked
from atlas_jax.index.files import create_npy, unwritten
from atlas_jax.index.int8 import INT8, Int8Rows, dtype_of
from atlas_jax.index.passages import PassageStore

INDEX_FORMAT = 1
REBUILD = "`python -m atlas_jax.build_index`"
_MANIFEST = "index.json"
_PROGRESS = ".index.json.unfinished"
_LOCK = f".{_MANIFEST}.lock"
_CHUNK_BYTES = 1 << 24
_ALIGNMENT = 64  # JAX takes over an aligned array on the CPU without a copy
# NumPy has no bfloat16 of its own, so its bits are stored.
_STORED: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    INT8: np.dtype(np.int8),
}


@dataclass(frozen=True)
class SavedIndex:
    """A loaded index.

    Attributes:
      embeddings_ne: memory-mapped float32 or bfloat16 embeddings, or ``Int8Rows``, one row
        per passage.
      version: how often the embeddings had been refreshed.
      encoder_hash: hash of the passage encoder that made them.
    """

    embeddings_ne: Any
    version: int
    encoder_hash: str


@contextlib.contextmanager
def new_index(
    directory: str | os.PathLike[str],
    store: PassageStore,
    encoder_hash: str,
    width: int,
    dtype: str = "float32",
    version: int = 0,
) -> Iterator[Any]:
    """Give a memory-mapped array [n, width] to fill; it becomes the index when the block ends well.

    An index that is there already is replaced then, not before. Numbers that are written to an
    array in 8 bits (``Int8Rows``) are rounded.

    Args:
      store: the passages that are embedded.
      encoder_hash: identifies the passage encoder and its parameters.
      width: of the embeddings.
      dtype: "float32", "bfloat16" or "int8".
      version: how often the embeddings have been refreshed.

    Raises:
      UserError: an unknown dtype, a directory that holds other things than an index, or
        it could not be written (a full disk, no permission).
    """
    folder, manifest = _begin(directory, store, encoder_hash, width, dtype, version)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / _LOCK, str(directory)):
            try:
                embeddings_ne = _create(folder, manifest)
                yield embeddings_ne
                _flush(embeddings_ne)
                _write_json(folder / _MANIFEST, manifest)
            finally:
                _remove_unnamed(folder)
    except OSError as error:
        raise unwritten(directory, error) from error


@dataclass(frozen=True)
class Unfinished:
    """An index in the making.

    Attributes:
      embeddings_ne: memory-mapped, to be filled from row `first` on.
      first: rows that an earlier attempt has left.
      stored: to be called with the number of rows that are there; a later attempt begins behind
        them.
    """

    embeddings_ne: Any
    first: int
    stored: Callable[[int], None]


@contextlib.contextmanager
def resumable_index(
    directory: str | os.PathLike[str],
    store: PassageStore,
    encoder_hash: str,
    width: int,
    dtype: str = "float32",
    version: int = 0,
) -> Iterator[Unfinished]:
    """Like ``new_index``, for what takes long: an attempt that ended on the way is gone on with.

    It has to have been of the same passages, encoder, type and version. After an error of the
    disk nothing is kept; after any other error, and after a kill, what was ``stored`` is.

    Raises:
      UserError: as ``new_index``.
    """
    folder, manifest = _begin(directory, store, encoder_hash, width, dtype, version)
    progress = folder / _PROGRESS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / _LOCK, str(directory)):
            try:
                first = 0
                found = _progress(folder, manifest)
                if found is not None:
                    manifest["embeddings"], first = found
                    embeddings_ne = _open(folder, manifest, "r+")
                else:
                    progress.unlink(missing_ok=True)
                    _remove_unnamed(folder)
                    embeddings_ne = _create(folder, manifest)

                def stored(rows: int) -> None:
                    _flush(embeddings_ne)
                    _write_json(progress, {**manifest, "rows": rows})

                yield Unfinished(embeddings_ne, first, stored)
                _flush(embeddings_ne)
                _write_json(folder / _MANIFEST, manifest)
                progress.unlink(missing_ok=True)
                _remove_unnamed(folder)
            except OSError:
                progress.unlink(missing_ok=True)
                _remove_unnamed(folder)
                raise
    except OSError as error:
        raise unwritten(directory, error) from error


def _begin(
    directory: str | os.PathLike[str],
    store: PassageStore,
    encoder_hash: str,
    width: int,
    dtype: str,
    version: int,
) -> tuple[Path, dict[str, Any]]:
    """The folder, which may be written, and what its manifest will be."""
    if dtype not in _STORED:
        raise UserError(f"index dtype {dtype!r}; it can be {', '.join(_STORED)}")
    folder = Path(directory)
    if folder.exists() and not (folder.is_dir() and _is_index_folder(folder)):
        raise UserError(f"{directory} exists and is no index; choose another directory")
    return folder, {
        "format": INDEX_FORMAT,
        "embeddings": f"embeddings-{os.urandom(4).hex()}.npy",
        "count": store.count,
        "width": width,
        "dtype": dtype,
        "version": version,
        "encoder_hash": encoder_hash,
        "store_hash": store.retriever_hash,
    }


def _progress(folder: Path, manifest: dict[str, Any]) -> tuple[str, int] | None:
    """Array and rows of an unfinished index of the same kind, if there is one."""
    try:
        found = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
        rows, name = found.pop("rows"), found["embeddings"]
        _open(folder, found, "r")
    except (OSError, ValueError, KeyError):
        return None
    same = {**found, "embeddings": ""} == {**manifest, "embeddings": ""}
    return (name, rows) if same else None


def _create(folder: Path, manifest: dict[str, Any]) -> Any:
    """The arrays that a manifest names, memory-mapped, to be filled."""
    name, count, dtype = manifest["embeddings"], manifest["count"], manifest["dtype"]
    rows_ne = create_npy(folder / name, (count, manifest["width"]), _STORED[dtype])
    if dtype != INT8:
        return rows_ne.view(jnp.dtype(dtype))
    return Int8Rows(rows_ne, create_npy(folder / _scales(name), (count,), np.dtype(np.float32)))


def _open(folder: Path, manifest: dict[str, Any], mode: Literal["r", "r+"]) -> Any:
    """The arrays that a manifest names, memory-mapped.

    Raises:
      OSError, ValueError: they are not there, or not as the manifest says.
    """
    name, count, dtype = manifest["embeddings"], manifest["count"], manifest["dtype"]

    def opened(name: str, shape: tuple[int, ...], stored_type: np.dtype) -> np.ndarray:
        array = np.load(folder / name, mmap_mode=mode)
        if array.shape != shape or array.dtype != stored_type:
            raise ValueError(f"{array.dtype} {array.shape} instead of {dtype} {shape}")
        return array

    rows_ne = opened(name, (count, manifest["width"]), _STORED[dtype])
    if dtype != INT8:
        return rows_ne.view(jnp.dtype(dtype))
    return Int8Rows(rows_ne, opened(_scales(name), (count,), np.dtype(np.float32)))


def _scales(name: str) -> str:
    """The file with the scales of the rows in 8 bits in the file `name`."""
    return name.replace(".npy", ".scales.npy")


def _flush(embeddings_ne: Any) -> None:
    for array in jax.tree.leaves(embeddings_ne):
        array.flush()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_text(path) as file:
        json.dump(value, file, indent=2)


def save_index(
    directory: str | os.PathLike[str],
    embeddings_ne: Any,
    store: PassageStore,
    encoder_hash: str,
    version: int = 0,
) -> None:
    """Save embeddings that are in memory, in their own type; see ``new_index``.

    Args:
      embeddings_ne: float32, bfloat16 or ``Int8Rows``, at least one row per passage; the rows
        of a ``DeviceIndex`` beyond them are padding and left out.

    Raises:
      UserError: as ``new_index``.
      ValueError: fewer rows than the store has.
    """
    rows, width = embeddings_ne.shape
    if rows < store.count:
        raise ValueError(f"{rows} embeddings for {store.count} passages of {store.directory}")
    dtype = dtype_of(embeddings_ne)
    with new_index(directory, store, encoder_hash, width, dtype, version) as made:
        step = max(1, _CHUNK_BYTES // (4 * width))
        for out, array in zip(jax.tree.leaves(made), jax.tree.leaves(embeddings_ne), strict=True):
            for start in range(0, store.count, step):
                end = min(start + step, store.count)
                out[start:end] = np.asarray(array[start:end])


def load_index(
    directory: str | os.PathLike[str], store: PassageStore, encoder_hash: str
) -> SavedIndex:
    """Open a saved index, checking that it belongs to the store and the encoder.

    Raises:
      UserError: there is none, it is damaged or of another version, or another corpus,
        retriever tokenizer or encoder made it (both hashes are named).
    """
    path = Path(directory) / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} is no index ({error}); build one with {REBUILD}") from error
    if manifest.get("format") != INDEX_FORMAT:
        raise UserError(
            f"{path}: index format {manifest.get('format')}, this version reads {INDEX_FORMAT}; "
            f"build it anew with {REBUILD}"
        )
    if manifest["store_hash"] != store.retriever_hash:
        raise UserError(
            f"{directory} was made from other passages or another retriever tokenizer "
            f"({manifest['store_hash'][:12]}) than the store {store.directory} holds "
            f"({store.retriever_hash[:12]}); build its index with {REBUILD}"
        )
    if manifest["encoder_hash"] != encoder_hash:
        raise UserError(
            f"{directory} was made by another passage encoder ({manifest['encoder_hash'][:12]}) "
            f"than this model's ({encoder_hash[:12]}); build the index anew with {REBUILD}, or "
            "load the model that it was made with"
        )
    try:
        embeddings_ne = _open(path.parent, manifest, "r")
    except (OSError, ValueError) as error:
        array = path.parent / manifest["embeddings"]
        raise UserError(f"{array} is damaged ({error}); build it anew with {REBUILD}") from error
    return SavedIndex(embeddings_ne, manifest["version"], encoder_hash)


def _is_index_folder(folder: Path) -> bool:
    names = [path.name.lstrip(".") for path in folder.iterdir()]  # dots: half-written
    return all(name.startswith((_MANIFEST, "embeddings-")) for name in names)


def _remove_unnamed(folder: Path) -> None:
    """Remove what a kill left, and arrays that `index.json` does not name: older or failed."""
    for path in folder.glob(".*"):
        if path.name not in (_PROGRESS, _LOCK):
            path.unlink(missing_ok=True)
    try:
        named = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["embeddings"]
    except (OSError, ValueError, KeyError):  # no index yet, or a damaged one
        named = ""
    for path in folder.glob("embeddings-*.npy"):
        if path.name not in (named, _scales(named)):
            path.unlink(missing_ok=True)
