"""Change a store and its index together: the new passages are tokenised and embedded, no others."""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule, batch_parts
from atlas_jax.core.types import Params
from atlas_jax.corpus.config import CorpusConfig
from atlas_jax.corpus.embedder import Embedder
from atlas_jax.index import changes
from atlas_jax.index.changes import Batch
from atlas_jax.index.living import LivingStore
from atlas_jax.index.passages import PassageStore
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
    ) -> None:
        """Compile nothing yet."""
        if jax.process_count() > 1:
            raise UserError("an index is changed by one process; run this on one host")
        self.config, self.tokenizers, self._params = config, tokenizers, params
        parts = batch_parts(mesh, rules)
        few = dataclasses.replace(config, embed_batch_size=-(-_FEW // parts) * parts)
        towers = retriever, tokenizers.retriever
        self._few = Embedder(*towers, few, mesh, rules)
        self._many = Embedder(*towers, config, mesh, rules)
        self._opened: list[PassageStore] = []  # segments that earlier changes have opened

    def of(self, segment: PassageStore) -> Embedder:
        """The one of two shapes that wastes less."""
        few = segment.count <= self.config.embed_batch_size // 2
        return self._few if few else self._many

    def change(
        self, batch: Batch, in_memory: bool = False, after: int | None = None
    ) -> tuple[LivingStore, Any]:
        """Make the next version of the store of `CorpusConfig`, and of its index if it has one.

        Args:
          in_memory: also return the embeddings of the new segment.
          after: see `changes.change`.

        Returns:
          The store as of the new version; float32 embeddings [r, e] of its new segment, or None.

        Raises:
          UserError: see `changes.change`; or the index is of another passage encoder.
        """
        config, made = self.config, []

        def embed(name: str, segment: PassageStore, now: LivingStore) -> None:
            embedder = self.of(segment)
            if in_memory or not config.index:
                plain = np.empty((segment.count, embedder.width), np.float32)
                made.append(embedder.fill(self._params, segment, plain))
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
                    embedder.save(place, made[0], segment, by, dtype)
                else:
                    embedder.to_directory(self._params, segment, place, 0, dtype)

        tokenizers = {"reader": self.tokenizers.reader, "retriever": self.tokenizers.retriever}
        store = changes.change(config.store, batch, tokenizers, embed, after, self._opened)
        # The first segment lies in the store's own folder, which may be built anew.
        self._opened = [one for one in store.segments if one.directory != store.directory]
        if config.index:
            remove_unnamed(config.index, store)
        return store, made[0] if made else None


def compact(
    store: str | os.PathLike[str], index: str | os.PathLike[str] = "", keep: int = 1
) -> LivingStore:
    """Join the segments of a store, and of its index, and give up old versions.

    Raises:
      UserError: see `changes.compact`; or a segment has no embeddings in the index.
    """

    def copy(name: str, living: LivingStore) -> None:
        if index:
            save_compacted(index, name, living, encoder_of(index, living))

    found = changes.compact(store, keep, copy)
    if index:
        remove_unnamed(index, found)
    return found
