"""Change a store and what was made of it together: only the new passages are read.

They are tokenised and embedded, and the states that a reader keeps of passages are computed.
"""

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from atlas_jax.core.errors import UserError
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
    """Embeds the few passages of a batch of changes."""

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
        if jax.process_count() > 1:
            raise UserError("an index is changed by one process; run this on one host")
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

        Args:
          in_memory: also return what was made of the new segment.
          after: see `changes.change`.

        Returns:
          The store as of the new version; what was made of its new segment, or None.

        Raises:
          UserError: see `changes.change`; or the index is of another passage encoder.
        """
        config, made = self.config, list[Fresh]()

        def embed(name: str, segment: PassageStore, now: LivingStore) -> None:
            embedder = self.of(segment)
            if in_memory or not config.index:
                plain = np.empty((segment.count, embedder.width), np.float32)
                apart_rf = self._states.of_segment(segment, name) if self._states else None
                made.append(Fresh(embedder.fill(self._params, segment, plain), apart_rf))
            if config.index:
                by = embedder.hash(self._params)
                if encoder_of(config.index, now) != by:
                    raise UserError(
                        f"{config.index} was made by another passage encoder than this model's; "
                        "change it with the model that made it, or build it anew"
                    )
                dtype = index_dtype(config.index, now)
                place = folder_of(config.index, segment, name)
                if made:
                    embedder.save(place, made[0].embeddings_re, segment, by, dtype)
                else:
                    embedder.to_directory(self._params, segment, place, 0, dtype)

        tokenizers = {"reader": self.tokenizers.reader, "retriever": self.tokenizers.retriever}
        store = changes.change(config.store, batch, tokenizers, embed, after, self._opened)
        # The first segment lies in the store's own folder, which may be built anew.
        self._opened = [one for one in store.segments if one.directory != store.directory]
        if config.index:
            remove_unnamed(config.index, store)
        if self._states is not None:
            self._states.remove_unnamed(store)
        return store, made[0] if made else None


def compact(
    store: str | os.PathLike[str],
    index: str | os.PathLike[str] = "",
    keep: int = 1,
    reader_states: str | os.PathLike[str] = "",
    scann: ScannConfig = ScannConfig(),
) -> LivingStore:
    """Join the segments of a store, of its index and of a reader's states; give up old versions.

    Args:
      keep: see `changes.compact`.
      scann: settings of the host searcher, where the index has been searched by it.

    Raises:
      UserError: see `changes.compact`; or a segment has no embeddings in the index.
    """

    def copy(name: str, living: LivingStore) -> None:
        if index:
            folder = save_compacted(index, name, living, encoder_of(index, living))
            save_scann_of(index, folder, scann)
        if os.fspath(reader_states):
            save_states(reader_states, name, living)

    found = changes.compact(store, keep, copy)
    if index:
        remove_unnamed(index, found)
    if os.fspath(reader_states):
        remove_unnamed_states(Path(reader_states), found)
    return found
