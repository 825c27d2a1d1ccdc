"""Change a store and what was made of it together: only the new passages are read.

They are tokenised and embedded, and the states that a reader keeps of passages are computed.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from atlas_jax.core.errors import UserError
from atlas_jax.core.meeting import Meeting
from atlas_jax.core.partitioning import Rule, batch_parts
from atlas_jax.core.types import Params
from atlas_jax.corpus.config import CorpusConfig
from atlas_jax.corpus.embedder import Embedder
from atlas_jax.corpus.reader_states import ReaderStates
from atlas_jax.corpus.reader_states import remove_unnamed as remove_unnamed_states
from atlas_jax.corpus.reader_states import save_compacted as save_states
from atlas_jax.index import changes
from atlas_jax.index.changes import Batch
from atlas_jax.index.living import LivingStore
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.scann_index import ScannConfig
from atlas_jax.index.scann_segments import save_scann_of
from atlas_jax.index.segment_indices import (
    encoder_of,
    folder_of,
    index_dtype,
    remove_unnamed,
    save_compacted,
)
from atlas_jax.models.assembly import Tokenizers
from atlas_jax.retriever.dual_encoder import DualEncoder

_FEW = 8  # passages embedded at a time, where a batch of changes has no more


class Fresh(NamedTuple):
    """What was made of the r new passages of a batch of changes.

    Attributes:
      embeddings_re: float32.
      apart_rf: float16 states of the reader; None where they are not kept.
    """

    embeddings_re: np.ndarray
    apart_rf: np.ndarray | None


class SegmentEmbedder:
    """Embeds the few passages of a batch of changes, with the devices of all processes."""

    def __init__(
        self,
        retriever: DualEncoder,
        params: Params,
        tokenizers: Tokenizers,
        config: CorpusConfig,
        mesh: Mesh,
        rules: tuple[Rule, ...],
        states: ReaderStates | None = None,
    ) -> None:
        """Compile nothing yet.

        Args:
          states: those that a reader keeps of the passages; None = missing ones are computed when
            the store is read.
        """
        self.config, self.tokenizers, self._params = config, tokenizers, params
        self._states = states
        parts = batch_parts(mesh, rules)
        few = dataclasses.replace(config, embed_batch_size=-(-_FEW // parts) * parts)
        towers = retriever, tokenizers.retriever
        self._few = Embedder(*towers, few, mesh, rules)
        self._many = Embedder(*towers, config, mesh, rules)
        self._opened: list[PassageStore] = []  # segments that earlier changes have opened

    def of(self, segment: PassageStore) -> Embedder:
        """The embedder of the shape, of the two, that wastes less padding."""
        few = segment.count <= self.config.embed_batch_size // 2
        return self._few if few else self._many

    def change(
        self, batch: Batch, in_memory: bool = False, after: int | None = None
    ) -> tuple[LivingStore, Fresh | None]:
        """Make the next version of the store of `CorpusConfig`, and of its index if it has one.

        All processes of a run must call it, with the same batch.

        Args:
          in_memory: also return what was made of the new segment.
          after: see `changes.change`.

        Returns:
          The store as of the new version; what was made of its new segment, or None.

        Raises:
          UserError, Interrupted: see `changes.change`; or the index is of another passage encoder.
        """
        config, made = self.config, list[Fresh]()

        def embed(name: str, segment: PassageStore, now: LivingStore) -> None:
            embedder = self.of(segment)
            if in_memory:
                plain = np.empty((segment.count, embedder.width), np.float32)
                apart_rf = self._states.of_segment(segment, name) if self._states else None
                made.append(Fresh(embedder.fill(self._params, segment, plain), apart_rf))
            if config.index:
                self._index(embedder, name, segment, now, made[0].embeddings_re if made else None)

        tokenizers = {"reader": self.tokenizers.reader, "retriever": self.tokenizers.retriever}
        tidy = functools.partial(_tidy, config.index, config.reader_states)
        told = config.store, batch, tokenizers, embed, after, self._opened, tidy
        store = changes.change(*told)
        # The first segment lies in the store's own folder, which may be built anew.
        self._opened = [one for one in store.segments if one.directory != store.directory]
        return store, made[0] if made else None

    def _index(
        self,
        embedder: Embedder,
        name: str,
        segment: PassageStore,
        now: LivingStore,
        embeddings_re: np.ndarray | None,
    ) -> None:
        """Save the embeddings of a segment, which are made now unless they are at hand."""
        index, by = self.config.index, embedder.hash(self._params)

        def dtype() -> str:
            if encoder_of(index, now) != by:
                raise UserError(
                    f"{index} was made by another passage encoder than this model's; "
                    "change it with the model that made it, or build it anew"
                )
            return index_dtype(index, now)

        found = Meeting(f"change of {index}").together("look", dtype)[0]
        place = folder_of(index, segment, name)
        if embeddings_re is None:
            embedder.to_directory(self._params, segment, place, 0, found)
        else:
            embedder.save(place, embeddings_re, segment, by, found)


def _tidy(
    index: str | os.PathLike[str], reader_states: str | os.PathLike[str], store: LivingStore
) -> None:
    """Remove what was made of segments that no version of a store names."""
    if os.fspath(index):
        remove_unnamed(index, store)
    if os.fspath(reader_states):
        remove_unnamed_states(Path(reader_states), store)


def compact(
    store: str | os.PathLike[str],
    index: str | os.PathLike[str] = "",
    keep: int = 1,
    reader_states: str | os.PathLike[str] = "",
    scann: ScannConfig = ScannConfig(),
) -> LivingStore:
    """Join the segments of a store, of its index and of a reader's states; give up old versions.

    All processes of a run must call it; each copies its share.

    Args:
      keep: see `changes.compact`.
      scann: settings of the host searcher, where the index has been searched by it.

    Raises:
      UserError, Interrupted: see `changes.compact`; or a segment has no embeddings in the index.
    """

    def copy(name: str, living: LivingStore) -> None:
        meeting = Meeting(f"copy of what belongs to {os.fspath(store)}")
        if index:
            by = meeting.together("look", lambda: encoder_of(index, living))[0]
            folder = save_compacted(index, name, living, by)
            meeting.together("scann", lambda: save_scann_of(index, folder, scann))
        if os.fspath(reader_states):
            told = reader_states, name, living
            meeting.together("states", lambda: save_states(*told) if meeting.is_first else None)

    return changes.compact(store, keep, copy, functools.partial(_tidy, index, reader_states))
