"""The embeddings of a store on disk.

A saved index is a folder with `index.json` and the array that it names; an int8 index has a second
array with its scales. A new version is written beside the old one. Then `index.json` is replaced in
one step. So after an error or a kill at any time the previous version can still be used.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from atlas_jax.core import bounds, strict_json
from atlas_jax.core.arrays import first_not_finite
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import atomic_text
from atlas_jax.core.locks import locked
from atlas_jax.core.paths import as_path, check_output_folder
from atlas_jax.core.whole import remove, unwritten
from atlas_jax.index.files import create_npy, open_npy
from atlas_jax.index.int8 import INT8, Int8Rows, dtype_of
from atlas_jax.index.passages import PassageStore

INDEX_FORMAT = 1
REBUILD = "`python -m atlas_jax.build_index`"
_MANIFEST = "index.json"
_PROGRESS = ".index.json.unfinished"
_LOCK = f".{_MANIFEST}.lock"
_CHUNK_BYTES = 1 << 24
_ALIGNMENT = 64  # on the CPU, JAX uses an aligned array without a copy
# NumPy has no bfloat16, so files store its bits as whole numbers.
_STORED: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    INT8: np.dtype(np.int8),
}


class _Manifest(TypedDict):
    """The content of index.json."""

    format: int
    embeddings: Annotated[str, Meta(pattern=r"^embeddings-[0-9a-f]+\.npy$")]
    count: Annotated[int, Meta(ge=1, le=bounds.LARGEST)]
    width: bounds.Width
    dtype: str
    version: bounds.Count
    encoder_hash: str
    store_hash: str


class _Progress(_Manifest):
    rows: bounds.Count


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
    """Give a memory-mapped array [n, width] to fill; when the block succeeds it is the index.

    An older index is replaced only then. Numbers written to an int8 array (``Int8Rows``) are
    rounded.

    Args:
      store: the passages that are embedded.
      encoder_hash: identifies the passage encoder and its parameters.
      width: of the embeddings.
      dtype: "float32", "bfloat16" or "int8".
      version: how often the embeddings have been refreshed.

    Raises:
      UserError: the dtype is unknown, the directory holds something else than an index, or it
        could not be written (a full disk, no permission).
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
    finally:
        _remove_if_empty(folder)


@dataclass(frozen=True)
class Unfinished:
    """An index that is not complete yet.

    Attributes:
      embeddings_ne: memory-mapped, to be filled from row `first` on.
      first: number of rows that an earlier attempt has filled.
      stored: call it with the number of rows filled so far; a later attempt skips these rows.
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
    """Like ``new_index``, but continues an earlier attempt that did not finish.

    It continues an attempt for the same passages, encoder, type and version; any other attempt is
    thrown away. Rows that were ``stored`` survive a kill, and every error but a disk error.

    Raises:
      UserError: as ``new_index``.
    """
    folder, manifest = _begin(directory, store, encoder_hash, width, dtype, version)
    progress = folder / _PROGRESS
    kept = False  # whether a later attempt can continue this one
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / _LOCK, str(directory)):
            try:
                first = 0
                found = _progress(folder, manifest)
                if found is not None:
                    kept = True
                    manifest["embeddings"], first = found
                    embeddings_ne = _open(folder, manifest, "r+")
                else:
                    progress.unlink(missing_ok=True)
                    _remove_unnamed(folder)
                    embeddings_ne = _create(folder, manifest)

                def stored(rows: int) -> None:
                    nonlocal kept
                    _flush(embeddings_ne)
                    _write_json(progress, {**manifest, "rows": rows})
                    kept = True

                yield Unfinished(embeddings_ne, first, stored)
                _flush(embeddings_ne)
                _write_json(folder / _MANIFEST, manifest)
                progress.unlink(missing_ok=True)
                _remove_unnamed(folder)
            except BaseException as error:
                if isinstance(error, OSError) or not kept:
                    progress.unlink(missing_ok=True)
                    _remove_unnamed(folder)
                raise
    except OSError as error:
        raise unwritten(directory, error) from error
    finally:
        _remove_if_empty(folder)


def _begin(
    directory: str | os.PathLike[str],
    store: PassageStore,
    encoder_hash: str,
    width: int,
    dtype: str,
    version: int,
) -> tuple[Path, dict[str, Any]]:
    """Check that the folder can be written; return it with its manifest."""
    if dtype not in _STORED:
        raise UserError(f"index dtype {dtype!r}; it can be {', '.join(_STORED)}")
    folder = check_output_folder(directory)
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
    """Array and number of rows of an unfinished index of the same kind, if one exists."""
    try:
        found: _Progress = strict_json.read(folder / _PROGRESS, _Progress)
        rows, name = found["rows"], found["embeddings"]
        _open(folder, found, "r")
    except UserError:  # there is none, or it is of another kind
        return None
    same = {**found, "embeddings": ""} == {**manifest, "embeddings": "", "rows": rows}
    return (name, rows) if same and rows <= found["count"] else None


def _create(folder: Path, manifest: dict[str, Any]) -> Any:
    """Create the arrays that a manifest names, memory-mapped, to be filled."""
    name, count, dtype = manifest["embeddings"], manifest["count"], manifest["dtype"]
    rows_ne = create_npy(folder / name, (count, manifest["width"]), _STORED[dtype])
    if dtype != INT8:
        return rows_ne.view(jnp.dtype(dtype))
    return Int8Rows(rows_ne, create_npy(folder / _scales(name), (count,), np.dtype(np.float32)))


def _open(folder: Path, manifest: Any, mode: Literal["r", "r+"]) -> Any:
    """Open the arrays that a manifest names, memory-mapped.

    Raises:
      UserError: a file is missing or does not match the manifest.
    """
    name, count, dtype = manifest["embeddings"], manifest["count"], manifest["dtype"]
    if dtype not in _STORED:
        raise UserError(
            f"{folder / _MANIFEST}: dtype is {dtype!r}; an index has {', '.join(_STORED)}"
        )
    shape = (count, manifest["width"])
    rows_ne = open_npy(folder / name, shape, _STORED[dtype].type, mode=mode)
    if dtype != INT8:
        return rows_ne.view(jnp.dtype(dtype))
    scales_n = open_npy(folder / _scales(name), (count,), np.float32, mode=mode)
    return Int8Rows(rows_ne, scales_n)


def _check_finite(path: Path, embeddings_ne: Any, width: int) -> None:
    """Refuse NaN and infinity: a search would rank such rows first or last for every question.

    Raises:
      UserError: names the file and the row.
    """
    if isinstance(embeddings_ne, Int8Rows):
        path, width, embeddings_ne = path.with_name(_scales(path.name)), 1, embeddings_ne.scales_n
        below = np.flatnonzero(embeddings_ne < 0)
        if below.size:
            raise UserError(f"{path}: row {below[0]} is below 0; build it anew with {REBUILD}")
    at = first_not_finite(embeddings_ne)
    if at is not None:
        raise UserError(f"{path}: row {at // width} is not finite; build it anew with {REBUILD}")


def _scales(name: str) -> str:
    """The file with the scales that belong to the int8 file `name`."""
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
    """Save embeddings from memory, in their own type; see ``new_index``.

    Args:
      embeddings_ne: float32, bfloat16 or ``Int8Rows``, one row per passage. Further rows, the
        padding of a ``DeviceIndex``, are left out.

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


@dataclass(frozen=True)
class OpenIndex:
    """An open index; its store and encoder were not checked.

    Attributes:
      embeddings_ne: see ``SavedIndex``; NaN and infinity were not looked for.
      manifest: the fields of ``index.json``: ``count``, ``width``, ``dtype``, ``version``,
        ``encoder_hash``, ``store_hash``.
    """

    embeddings_ne: Any
    manifest: Mapping[str, Any]


def open_index(directory: str | os.PathLike[str]) -> OpenIndex:
    """Open a saved index without its store and encoder.

    Raises:
      UserError: there is no index, or it is damaged or of another format version.
    """
    manifest = _read_manifest(directory)
    return OpenIndex(_open_array(directory, manifest), manifest)


def load_index(
    directory: str | os.PathLike[str], store: PassageStore, encoder_hash: str
) -> SavedIndex:
    """Open a saved index, checking that it belongs to the store and the encoder.

    Raises:
      UserError: there is no index; it is damaged or of another format version; or it was made
        from another corpus, retriever tokenizer or encoder (both hashes are named).
    """
    manifest = _read_manifest(directory)
    check_store(directory, manifest, store)
    if manifest["encoder_hash"] != encoder_hash:
        raise UserError(
            f"{directory} was made by another passage encoder ({manifest['encoder_hash'][:12]}) "
            f"than this model's ({encoder_hash[:12]}); build the index anew with {REBUILD}, or "
            "load the model that it was made with"
        )
    embeddings_ne = _open_array(directory, manifest)
    array = as_path(directory) / manifest["embeddings"]
    _check_finite(array, embeddings_ne, manifest["width"])
    return SavedIndex(embeddings_ne, manifest["version"], encoder_hash)


def check_store(
    directory: str | os.PathLike[str], manifest: Mapping[str, Any], store: PassageStore
) -> None:
    """Refuse a store that an index was not made from.

    Raises:
      UserError: names both hashes or both numbers of passages.
    """
    if manifest["store_hash"] != store.retriever_hash:
        raise UserError(
            f"{directory} was made from other passages or another retriever tokenizer "
            f"({manifest['store_hash'][:12]}) than the store {store.directory} holds "
            f"({store.retriever_hash[:12]}); build its index with {REBUILD}"
        )
    if manifest["count"] != store.count:
        raise UserError(
            f"{as_path(directory) / _MANIFEST}: {manifest['count']} passages, but the store "
            f"{store.directory} has {store.count}; build it anew with {REBUILD}"
        )


def _read_manifest(directory: str | os.PathLike[str]) -> _Manifest:
    path = as_path(directory) / _MANIFEST
    try:
        found: dict[str, Any] = strict_json.read(path, dict[str, Any])
    except UserError as error:
        raise UserError(f"{directory} is no index ({error}); build one with {REBUILD}") from error
    if found.get("format") != INDEX_FORMAT:
        raise UserError(
            f"{path}: index format {bounds.shown(found.get('format'))}, this version reads "
            f"{INDEX_FORMAT}; build it anew with {REBUILD}"
        )
    manifest: _Manifest = strict_json.convert(found, _Manifest, str(path))
    return manifest


def _open_array(directory: str | os.PathLike[str], manifest: _Manifest) -> Any:
    try:
        return _open(as_path(directory), manifest, "r")
    except UserError as error:
        raise UserError(f"{error}; build it anew with {REBUILD}") from error


def _is_index_folder(folder: Path) -> bool:
    names = [path.name.lstrip(".") for path in folder.iterdir()]  # half-written: .NAME
    return all(name.startswith((_MANIFEST, "embeddings-")) for name in names)


def _remove_unnamed(folder: Path) -> None:
    """Remove half-written files, and all of arrays that `index.json` does not name."""
    for path in folder.glob(".*"):
        if path.name not in (_PROGRESS, _LOCK):
            remove(path)
    try:
        manifest: _Manifest = strict_json.read(folder / _MANIFEST, _Manifest)
        named = manifest["embeddings"].partition(".")[0]
    except UserError:  # no index yet, or a damaged one
        named = ""
    for path in folder.glob("embeddings-*.*"):
        if path.name.partition(".")[0] != named:
            remove(path)


def _remove_if_empty(folder: Path) -> None:
    """Remove the folder if no index was made in it."""
    with contextlib.suppress(OSError):  # it holds an index
        folder.rmdir()
