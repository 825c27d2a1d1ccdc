"""The embeddings of a store that has versions: those of each segment, made once.

In an index's folder the embeddings of the store's first segment lie as ever. Those of a later one
are an index of their own, in embeddings-of-segments/NAME.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import jax

from atlas_jax.core.errors import UserError
from atlas_jax.core.objects import place_of
from atlas_jax.core.whole import remove
from atlas_jax.index.int8 import dtype_of
from atlas_jax.index.living import LivingStore, segment_folder
from atlas_jax.index.new_index import OF_SEGMENTS, save_index
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.saved import REBUILD, SavedIndex, load_index, open_index
from atlas_jax.index.versions import FIRST, first_is_given_up, unnamed


def load_embeddings(
    directory: str | os.PathLike[str], store: PassageStore, encoder_hash: str
) -> SavedIndex:
    """The embeddings of a store as of its version, in the order of its rows; see `load_index`.

    Nothing is copied: what is asked for is read where it lies.

    Raises:
      UserError: as `load_index`, of a segment; or segments are of different types.
    """
    folders = folders_of(directory, store)
    if not isinstance(store, LivingStore) or store.is_plain or _is_of(directory, store):
        return load_index(folders[0], store, encoder_hash)
    loaded = [
        load_index(folder, segment, encoder_hash)
        for folder, segment in zip(folders, store.segments, strict=True)
    ]
    kinds = [dtype_of(one.embeddings_ne) for one in loaded]
    if len(set(kinds)) > 1:
        raise UserError(f"{directory}: its segments are of the types {kinds}; {REBUILD}")
    arrays = [one.embeddings_ne for one in loaded]
    joined = jax.tree.map(lambda *leaves: store.view(list(leaves)), *arrays)
    return SavedIndex(joined, loaded[0].version, encoder_hash)


def folders_of(directory: str | os.PathLike[str], store: PassageStore) -> list[Path]:
    """Where an index has the embeddings of a store as of its version, one folder after the other.

    They are those of its segments, unless the index is of this very version.
    """
    if not isinstance(store, LivingStore) or _is_of(directory, store):
        return [place_of(directory)]
    pairs = zip(store.segments, store.version["segments"], strict=True)
    return [folder_of(directory, segment, name) for segment, name in pairs]


def folder_of(directory: str | os.PathLike[str], segment: PassageStore, name: str) -> Path:
    """Where an index has the embeddings of a segment, or is to have them."""
    is_first = name == FIRST or _is_of(directory, segment)
    return place_of(directory) if is_first else place_of(directory) / OF_SEGMENTS / name


def save_compacted(
    directory: str | os.PathLike[str], name: str, store: LivingStore, encoder_hash: str
) -> Path:
    """Copy the embeddings of the living rows, for the segment that `compact` writes.

    Returns:
      The folder that has them.
    """
    found = load_embeddings(directory, store, encoder_hash)
    segment = PassageStore.open(segment_folder(store.directory, name))
    folder = Path(directory) / OF_SEGMENTS / name
    save_index(folder, found.embeddings_ne, segment, encoder_hash, found.version)
    return folder


def index_dtype(directory: str | os.PathLike[str], store: LivingStore) -> str:
    """The type of an index's embeddings."""
    found = folder_of(directory, store.segments[0], store.version["segments"][0])
    return str(open_index(found).manifest["dtype"])


def encoder_of(directory: str | os.PathLike[str], store: LivingStore) -> str:
    """The hash of the passage encoder that made an index."""
    found = folder_of(directory, store.segments[0], store.version["segments"][0])
    return str(open_index(found).manifest["encoder_hash"])


def remove_unnamed(directory: str | os.PathLike[str], store: LivingStore) -> None:
    """Remove the embeddings of segments that no version of the store names."""
    folder = Path(directory) / OF_SEGMENTS
    for path in unnamed(store.directory, folder.iterdir() if folder.is_dir() else ()):
        shutil.rmtree(path, ignore_errors=True)
    if first_is_given_up(store.directory) and not _is_of(directory, store):
        for path in Path(directory).glob("embeddings-*"):
            if path.name != OF_SEGMENTS:
                remove(path)
        (Path(directory) / "index.json").unlink(missing_ok=True)


def _is_of(directory: str | os.PathLike[str], store: PassageStore) -> bool:
    """Whether the index in the folder itself is of this store or segment."""
    try:
        found: Any = open_index(directory)
    except UserError:
        return False
    return bool(found.manifest["store_hash"] == store.retriever_hash)
