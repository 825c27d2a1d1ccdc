"""The passage tower as a function over a whole store."""

import functools
from collections.abc import Callable, Collection
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
from atlas_jax.corpus.rounding import new_dtype, tell_chosen
from atlas_jax.index.embed import EmbedFn, Parts, chunk_rows, embed_corpus
from atlas_jax.index.int8 import abstract_rows, stored_as
from atlas_jax.index.new_index import save_index, shared_index
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.placement import rows_sharding
from atlas_jax.index.rolling import refresh_rows
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

        def compiled(shardings: Any) -> Callable[[Params, Any], jax.Array]:
            options = encoder_options()
            return jax.jit(tower, out_shardings=shardings, compiler_options=options)

        self._embed = compiled(partitioning.replicated(mesh))  # for memory: every host has all
        self._embed_own = compiled(self._rows)  # for files: each host has what it writes
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
        tell_chosen(self._config, store.count, self.width)
        dtype = new_dtype(self._config, store.count, self.width)
        shapes = abstract_rows(store.count, self.width, dtype)
        out_ne = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
        return self.fill(params, store, out_ne)

    def fill(self, params: Params, store: PassageStore, out_ne: Any) -> Any:
        """Embed a store into an array [n, e] that is there already; returns it."""
        fed, _ = self._own_parts
        every = tuple(range(self._count))
        self._run(self._embed, params, store, out_ne, Parts(self._count, fed, every), np.asarray)
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

        Each process feeds the passages of its own devices, and writes their embeddings.

        Args:
          dtype: of the index; "" = see `new_dtype`.

        Raises:
          UserError: the index could not be written, or another process failed; an earlier one is
            unchanged.
        """
        found = self.hash(params)
        if not dtype:
            tell_chosen(self._config, store.count, self.width)
            dtype = new_dtype(self._config, store.count, self.width)
        fed, kept = self._own_parts
        parts, chunk = Parts(self._count, fed, kept), chunk_rows(store.count, self._count)
        told = directory, store, found, self.width, dtype, version, chunk
        with shared_index(*told) as made:
            to_host = functools.partial(_local, size=self._size, parts=kept)
            self._run(self._embed_own, params, store, made.embeddings_ne, parts, to_host, made.done)
        return found

    def _run(
        self,
        embed: Callable[[Params, Any], jax.Array],
        params: Params,
        store: PassageStore,
        out_ne: Any,
        parts: Parts,
        to_host: Callable[[Any], np.ndarray],
        done: Collection[int] = (),
    ) -> None:
        size = self._config.embed_batch_size
        function: EmbedFn = lambda tokens: embed(  # noqa: E731
            params, multihost.place_rows(tokens, self._rows, size)
        )
        embed_corpus(
            function,
            store.retriever_tokens_nm,
            size,
            out_ne,
            # Nobody waits for a single batch.
            progress=store.count > size and multihost.is_first(),
            done=done,
            at_a_time=programs_at_a_time() if jax.process_count() == 1 else 1,
            parts=parts,
            to_host=to_host,
        )

    @functools.cached_property
    def _count(self) -> int:
        """Parts of a batch."""
        return len(self._holders)

    @property
    def _size(self) -> int:
        """Rows of a part of a batch."""
        return self._config.embed_batch_size // self._count

    @functools.cached_property
    def _holders(self) -> dict[int, set[int]]:
        """First row of each part of a batch -> the processes that hold it."""
        found: dict[int, set[int]] = {}
        rows: Any = self._rows.devices_indices_map((self._config.embed_batch_size,))
        for device, (part,) in rows.items():
            found.setdefault(part.start or 0, set()).add(device.process_index)
        return dict(sorted(found.items()))

    @functools.cached_property
    def _own_parts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The parts that this process feeds, and those that it writes: each has one writer."""
        own, holders = jax.process_index(), list(self._holders.values())
        fed = tuple(part for part, held in enumerate(holders) if own in held)
        return fed, tuple(part for part in fed if min(holders[part]) == own)


def _local(array: jax.Array | np.ndarray, size: int, parts: tuple[int, ...]) -> np.ndarray:
    """Some parts of a batch, which this process holds, as one array."""
    if isinstance(array, np.ndarray):  # batches side by side are whole, on one device
        return array
    held = {(one.index[0].start or 0) // size: one.data for one in array.addressable_shards}
    if not parts:
        return np.empty((0, *array.shape[1:]), array.dtype)
    return np.concatenate([np.asarray(held[part]) for part in parts])
