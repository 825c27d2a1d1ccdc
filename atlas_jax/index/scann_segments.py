"""ScaNN over the segments of a store: saved beside each segment's embeddings, and used again.

Where an index has `embeddings-NAME`, the ScaNN index of these rows is `embeddings-NAME.scann/`;
of several processes each has one of its own share of the rows, `embeddings-NAME.scann-1-of-4/`.
Only what is large enough to be compressed is saved: brute force has nothing to train. A saved index
that is missing, damaged or of other settings is built anew, with a note. Beside an index in a
bucket nothing is saved.
"""

import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import is_remote
from atlas_jax.core.types import NO_ROW
from atlas_jax.core.whole import whole_folder
from atlas_jax.index.arrays import TakenRows
from atlas_jax.index.living import LivingStore
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.saved import OpenIndex, open_index
from atlas_jax.index.scann_index import ScannConfig, ScannIndex, Unusable, build_of
from atlas_jax.index.scann_search import Part, ScannSearcher
from atlas_jax.index.segment_indices import folders_of


def scann_in_memory(embeddings_ne: Any, config: ScannConfig) -> ScannSearcher:
    """A searcher of embeddings that lie in no index; nothing is saved.

    Args:
      embeddings_ne: float32 or bfloat16 embeddings of real passages only.

    Raises:
      UserError: ScaNN is not installed, or only codes are to be in memory.
    """
    if config.rows == "disk" and _is_large(len(embeddings_ne), config):
        raise UserError(
            "ScannConfig.rows = 'disk': these embeddings lie in no file; build an index with "
            "`atlas-jax build_index`, and bind CorpusConfig.index to it"
        )
    rows_n = np.arange(len(embeddings_ne), dtype=np.int32)
    own, kind = _own(len(rows_n)), config if _is_large(len(rows_n), config) else _exact(len(rows_n))
    return ScannSearcher(_part(embeddings_ne[own], rows_n[own], kind), len(rows_n), config)


def scann_of_segments(
    directory: str | os.PathLike[str],
    store: PassageStore,
    embeddings_ne: Any,
    config: ScannConfig,
) -> ScannSearcher:
    """A searcher of an index's embeddings; what is trained for it is saved beside them.

    Args:
      directory: of the index.
      store: its passages, as of a version.
      embeddings_ne: what `load_embeddings` gave for both.

    Raises:
      UserError: ScaNN is not installed.
    """
    parts: list[Part] = []
    small, start = [np.zeros(0, np.int32)], 0
    for folder in folders_of(directory, store):
        opened = open_index(folder)
        count = opened.manifest["count"]
        rows_m = _rows_in(store, start, count)
        start += count
        if not _is_large(count, config):
            small.append(rows_m[rows_m != NO_ROW])
            continue
        own = _own(count)
        parts.append(Part(_saved(folder, opened, own, config), rows_m[own]))
    together = np.sort(np.concatenate(small))
    own_m = together[_own(len(together))]
    parts += _part(embeddings_ne[own_m], own_m, _exact(len(together)))
    return ScannSearcher(parts, store.count, config)


def _part(embeddings_me: Any, rows_m: np.ndarray, config: ScannConfig) -> list[Part]:
    """A part that is not saved; none of no rows."""
    return [Part(ScannIndex.made(embeddings_me, config), rows_m)] if len(rows_m) else []


def save_scann_of(directory: str | os.PathLike[str], folder: Path, config: ScannConfig) -> None:
    """Build and save the ScaNN index of a segment's embeddings, if `directory` has any of others.

    So `compact`, which merges the segments of an index, merges what was trained for them, too.

    Args:
      directory: of the index.
      folder: where it has the embeddings of the segment.
    """
    opened = open_index(folder)
    count = opened.manifest["count"]
    if _is_large(count, config) and any(Path(directory).rglob("*.scann*")):
        _saved(folder, opened, _own(count), config)


def _saved(folder: Path, opened: OpenIndex, own: slice, config: ScannConfig) -> ScannIndex:
    """The saved index of the own rows of a segment; built and saved where there is none."""
    count, width = own.stop - own.start, opened.manifest["width"]
    array = folder / opened.manifest["embeddings"]
    whole = jax.process_count() == 1
    share = "" if whole else f"-{jax.process_index() + 1}-of-{jax.process_count()}"
    place = array.with_suffix(f".scann{share}")
    rows_ne = opened.embeddings_ne
    if not whole:
        rows_ne = TakenRows(rows_ne, np.arange(own.start, own.stop))
    # ScaNN can read the rows out of the index's own file where they are all there as it needs them.
    is_npy = array.suffix == ".npy" and opened.manifest["dtype"] == "float32"  # of format 1
    rows_file = array if whole and is_npy else None
    build = build_of(count, width, config)
    if is_remote(folder):
        return ScannIndex.made(rows_ne, config)
    if place.exists():
        try:
            return ScannIndex.load(place, build, rows_ne, rows_file)
        except Unusable as reason:
            print(f"{reason}; ScaNN's index is built anew", file=sys.stderr)
    made = ScannIndex.made(rows_ne, config)
    try:
        with whole_folder(place, replace=True) as work:
            made.save(work, rows_file is not None)
    except UserError as error:
        print(f"{error}; ScaNN's index is built at each start", file=sys.stderr)
    return made


def _rows_in(store: PassageStore, start: int, count: int) -> np.ndarray:
    """The store's row of each row of a segment, int32; -1 where it is deleted."""
    if not isinstance(store, LivingStore) or count == store.count and store.is_plain:
        return np.arange(count, dtype=np.int32)
    rows_m = np.full(count, NO_ROW, np.int32)
    held = (store.places_n >= start) & (store.places_n < start + count)
    rows_m[store.places_n[held] - start] = np.flatnonzero(held)
    return rows_m


def _exact(count: int) -> ScannConfig:
    """Settings with which so many rows are searched by brute force."""
    return ScannConfig(hash_from=count + 1, tree_from=count + 1)


def _is_large(count: int, config: ScannConfig) -> bool:
    """Whether each process's share of so many rows is compressed; the same on all of them."""
    return count // jax.process_count() >= config.hash_from


def _own(count: int) -> slice:
    """The share of so many rows that this process searches."""
    index, processes = jax.process_index(), jax.process_count()
    return slice(index * count // processes, (index + 1) * count // processes)
