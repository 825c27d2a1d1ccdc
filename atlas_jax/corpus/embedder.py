"""The passage tower as a function over a whole store."""

import collections
import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from atlas_jax.core import multihost, partitioning
from atlas_jax.core.compiler import encoder_options, programs_at_a_time
from atlas_jax.core.partitioning import Rule, batch_sharding
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import DeviceIndex, Params
from atlas_jax.corpus.config import CorpusConfig
from atlas_jax.index.embed import EmbedFn, embed_corpus, embedded_batches
from atlas_jax.index.int8 import abstract_rows, stored_as
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.placement import rows_sharding
from atlas_jax.index.rolling import refresh_rows
from atlas_jax.index.saved import Unfinished, resumable_index, save_index
from atlas_jax.models.fingerprint import encoder_hash
from atlas_jax.models.towers import passage_tower
from atlas_jax.retriever.dual_encoder import DualEncoder


class Embedder:
    """The passage tower as a function over a whole store."""

    def __init__(
        self,
        retriever: DualEncoder,
        tokenizer: Tokenizer,
        config: CorpusConfig,
        mesh: Mesh,
        rules: tuple[Rule, ...],
    ) -> None:
        """Compile nothing yet; raise a UserError if batches do not divide over the mesh."""
        self._retriever, self._tokenizer, self._config = retriever, tokenizer, config
        self._rows = batch_sharding(
            "CorpusConfig.embed_batch_size", config.embed_batch_size, mesh, rules
        )

        tower = passage_tower(retriever)
        self._embed: Callable[[Params, Any], jax.Array] = jax.jit(
            tower,
            out_shardings=partitioning.replicated(mesh),
            compiler_options=encoder_options(),
        )
        self._refresh: Callable[..., Any] = jax.jit(
            functools.partial(refresh_rows, tower, batch_size=config.embed_batch_size, mesh=mesh),
            donate_argnums=1,
            out_shardings=rows_sharding(mesh),
        )

    def refresh(self, params: Params, index: DeviceIndex, rows_r: np.ndarray) -> Any:
        """Embed some rows of an index anew; the old embeddings are donated.

        Compiles once per number of rows.
        """
        assert index.retriever_tokens_nm is not None
        return self._refresh(params, index.embeddings_ne, index.retriever_tokens_nm, rows_r)

    def hash(self, params: Params) -> str:
        """Fingerprint of the embeddings that these retriever parameters give."""
        return encoder_hash(self._retriever.config, params, self._tokenizer)

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return self._retriever.config.embedding_dim

    def to_memory(self, params: Params, store: PassageStore) -> Any:
        """Embed a store into an array [n, e], or `Int8Rows`."""
        shapes = abstract_rows(store.count, self.width, self._config.dtype)
        out_ne = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
        return self.fill(params, store, out_ne)

    def fill(self, params: Params, store: PassageStore, out_ne: Any) -> Any:
        """Embed a store into an array [n, e] that is there already; returns it."""
        self._fill(params, store, Unfinished(out_ne, 0, lambda rows: None))
        return out_ne

    def save(
        self, directory: str | Path, floats_ne: Any, store: PassageStore, made_by: str, dtype: str
    ) -> None:
        """Save embeddings that were made before, in the type of an index."""
        rows = floats_ne if dtype == "float32" else stored_as(floats_ne, dtype)
        save_index(directory, rows, store, made_by)

    def to_directory(
        self,
        params: Params,
        store: PassageStore,
        directory: str | Path,
        version: int = 0,
        dtype: str = "",
    ) -> str:
        """Embed a store into a saved index, replacing an older one; returns its encoder hash.

        Args:
          dtype: of the index; "" = CorpusConfig.dtype.

        Raises:
          UserError: the index could not be written; an earlier one is unchanged.
        """
        found = self.hash(params)
        dtype = dtype or self._config.dtype
        with contextlib.ExitStack() as stack:
            made = None  # the other processes take part in the computation alone
            if multihost.is_first():
                made = stack.enter_context(
                    resumable_index(directory, store, found, self.width, dtype, version)
                )
            self._fill(params, store, made)
        multihost.barrier("index")
        return found

    def _fill(self, params: Params, store: PassageStore, made: Unfinished | None) -> None:
        """Embed the rows that `made` lacks; a process without `made` only computes its share."""
        first = multihost.of_first(made.first if made else 0)
        function: EmbedFn = lambda tokens: self._embed(  # noqa: E731
            params, multihost.place(tokens, self._rows)
        )
        tokens_nm, size = store.retriever_tokens_nm, self._config.embed_batch_size
        if made is None:
            collections.deque(embedded_batches(function, tokens_nm, size, False, first), maxlen=0)
            return
        embed_corpus(
            function,
            tokens_nm,
            size,
            made.embeddings_ne,
            progress=store.count > size,  # nobody waits for a single batch
            first=first,
            stored=made.stored,
            at_a_time=programs_at_a_time(),
        )
