"""The embeddings of a store, on a disk or in a bucket.

A saved index is a folder with `index.json` and the folder of zarr arrays that it names: `rows`, and
for an int8 index `scales` (see `arrays.py`). `new_index.py` writes it. An index of format 1, which
earlier versions wrote, has a .npy file in place of each array; it is only read.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from atlas_jax.core import bounds, strict_json
from atlas_jax.core.arrays import first_not_finite
from atlas_jax.core.errors import Interrupted, UserError, advised
from atlas_jax.core.objects import Objects
from atlas_jax.index.arrays import Finish, ZarrRows
from atlas_jax.index.files import open_npy
from atlas_jax.index.int8 import INT8, Int8Rows
from atlas_jax.index.passages import PassageStore

INDEX_FORMAT = 2
MANIFEST = "index.json"
REBUILD = "`python -m atlas_jax.build_index`"
_ANEW = f"build it anew with {REBUILD}"
TYPES = ("float32", "bfloat16", INT8)
_FLAT = 1  # format of the indices that earlier versions wrote
# NumPy has no bfloat16, so .npy files store its bits as whole numbers.
_IN_NPY: dict[str, type] = {"float32": np.float32, "bfloat16": np.uint16, INT8: np.int8}


class IndexManifest(TypedDict):
    """The content of index.json."""

    format: int
    embeddings: Annotated[str, Meta(pattern=r"^embeddings-[0-9a-f]+(\.npy)?$")]
    count: Annotated[int, Meta(ge=1, le=bounds.LARGEST)]
    width: bounds.Width
    dtype: str
    version: bounds.Count
    encoder_hash: str
    store_hash: str
    chunk: NotRequired[Annotated[int, Meta(ge=1, le=bounds.LARGEST)]]


@dataclass(frozen=True)
class SavedIndex:
    """A loaded index.

    Attributes:
      embeddings_ne: float32 or bfloat16 embeddings, or ``Int8Rows``, one row per passage, read
        when they are asked for. A row that is not finite is then an error.
      version: how often the embeddings had been refreshed.
      encoder_hash: hash of the passage encoder that made them.
    """

    embeddings_ne: Any
    version: int
    encoder_hash: str


class _IndexRows(ZarrRows):
    """An array of an index, whose errors say what to do."""

    def begin_parts(self, starts_p: np.ndarray, stops_p: np.ndarray) -> Finish:
        """See `ZarrRows.begin_parts`."""
        done = advised(super().begin_parts, _ANEW)(starts_p, stops_p)
        return lambda: advised(done, _ANEW)()


class _FiniteRows(_IndexRows):
    """Numbers of which none may be NaN or infinite, nor, if they are scales, below 0.

    A search would rank such rows first or last for every question.
    """

    def begin_parts(self, starts_p: np.ndarray, stops_p: np.ndarray) -> Finish:
        """See `ZarrRows.begin_parts`."""
        done = super().begin_parts(starts_p, stops_p)

        def checked() -> np.ndarray:
            rows = done()
            at = first_not_finite(rows)
            problem = "is not finite"
            if at is None and self.ndim == 1 and (rows < 0).any():
                at, problem = int(np.argmax(rows < 0)), "is below 0"
            if at is not None:
                own = at // max(1, rows[:1].size)
                row = np.concatenate(
                    [np.arange(a, b) for a, b in zip(starts_p, stops_p, strict=True)]
                )[own]
                raise UserError(f"{self.where}: row {row} {problem}; {_ANEW}")
            return rows

        return checked


def _open(directory: str | os.PathLike[str], manifest: IndexManifest, checked: bool) -> Any:
    """The arrays that a manifest names.

    Raises:
      UserError: a file is missing or does not match the manifest.
    """
    objects, dtype = Objects(directory), manifest["dtype"]
    if dtype not in TYPES:
        raise UserError(
            f"{objects.at(MANIFEST)}: dtype is {dtype!r}; an index has {', '.join(TYPES)}"
        )
    if manifest["format"] == _FLAT:
        return _open_flat(Path(directory), manifest, checked)
    count, width, name = manifest["count"], manifest["width"], manifest["embeddings"]
    kind = _FiniteRows if checked else _IndexRows
    is_int8 = dtype == INT8
    rows_ne = (_IndexRows if is_int8 else kind)(objects, f"{name}/rows", (count, width), dtype)
    if not is_int8:
        return rows_ne
    return Int8Rows(rows_ne, kind(objects, f"{name}/scales", (count,), np.float32))


def _open_flat(folder: Path, manifest: IndexManifest, checked: bool) -> Any:
    """The arrays of an index of format 1, memory-mapped."""
    name, count, dtype = manifest["embeddings"], manifest["count"], manifest["dtype"]
    rows_ne = open_npy(folder / name, (count, manifest["width"]), _IN_NPY[dtype])
    if dtype != INT8:
        floats_ne = rows_ne.view(jnp.dtype(dtype))
        if checked:
            _check_finite(folder / name, floats_ne)
        return floats_ne
    scales = folder / name.replace(".npy", ".scales.npy")
    scales_n = open_npy(scales, (count,), np.float32)
    if checked:
        _check_finite(scales, scales_n)
        below = np.flatnonzero(scales_n < 0)
        if below.size:
            raise UserError(f"{scales}: row {below[0]} is below 0; {_ANEW}")
    return Int8Rows(rows_ne, scales_n)


def _check_finite(path: Path, rows: np.ndarray) -> None:
    at = first_not_finite(rows)
    if at is not None:
        row = at // max(1, rows[:1].size)
        raise UserError(f"{path}: row {row} is not finite; {_ANEW}")


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
    return OpenIndex(_open_array(directory, manifest, checked=False), manifest)


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
    embeddings_ne = _open_array(directory, manifest, checked=True)
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
            f"{Objects(directory).at(MANIFEST)}: {manifest['count']} passages, but the store "
            f"{store.directory} has {store.count}; {_ANEW}"
        )


def _read_manifest(directory: str | os.PathLike[str]) -> IndexManifest:
    objects = Objects(directory)
    path = objects.at(MANIFEST)
    try:
        raw = objects.read(MANIFEST)
        found: dict[str, Any] = strict_json.parse_as(raw, dict[str, Any], path)
    except Interrupted:  # it cannot be reached
        raise
    except UserError as error:
        raise UserError(f"{directory} is no index ({error}); build one with {REBUILD}") from error
    if found.get("format") not in (_FLAT, INDEX_FORMAT):
        raise UserError(
            f"{path}: index format {bounds.shown(found.get('format'))}, this version reads "
            f"{_FLAT} and {INDEX_FORMAT}; {_ANEW}"
        )
    manifest: IndexManifest = strict_json.convert(found, IndexManifest, path)
    return manifest


def _open_array(directory: str | os.PathLike[str], manifest: IndexManifest, checked: bool) -> Any:
    return advised(_open, _ANEW)(directory, manifest, checked)
