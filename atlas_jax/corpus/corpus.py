"""The corpus of a run: its passage store, and the index over it, fresh or stale.

A run keeps the embeddings that it makes in versions/<version>/. A checkpoint notes the version that
was searched. After a slice has been refreshed the embeddings are no longer those of any version;
then the checkpoint holds them itself. So a resumed run searches exactly what the killed run did.
"""

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from atlas_jax.core import multihost
from atlas_jax.core.errors import UserError
from atlas_jax.core.objects import Objects
from atlas_jax.core.types import DeviceIndex, Params
from atlas_jax.corpus.change import Fresh
from atlas_jax.corpus.config import CorpusSpec
from atlas_jax.corpus.embedder import Embedder
from atlas_jax.corpus.reader_states import ReaderStates
from atlas_jax.corpus.rounding import is_chosen, searched_dtype, settled_rerank
from atlas_jax.index.arrays import Rows
from atlas_jax.index.exact import gather_rows
from atlas_jax.index.hot import GROWTH, HotRows, moved, moves
from atlas_jax.index.int8 import INT8, dtype_of, stored_as
from atlas_jax.index.living import LivingStore
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.placement import embeddings_layout, to_device
from atlas_jax.index.saved import load_index
from atlas_jax.index.scann_search import ScannSearcher
from atlas_jax.index.scann_segments import scann_in_memory, scann_of_segments
from atlas_jax.index.search import Searcher
from atlas_jax.index.segment_indices import load_embeddings

_NEARLY = 0.9  # of the capacity


class Corpus:
    """A store and the index over it, on the devices or in a host searcher.

    Attributes:
      store: the passages.
      version: how often all of the embeddings have been refreshed, at once or in slices.
      encoder_hash: of the passage tower that made the embeddings; "" once slices differ.
      next_row: where the next slice begins.
      dtype: of the embeddings that are searched, as in CorpusConfig.
      on_host: whether a host searcher serves.
      recall_target: of the search on the devices, see `exact_search`.
      index: on the devices; None when a host searcher serves.
      states: those that the reader keeps of the passages; to be set before an index is loaded.
      searcher: on the host; None when the devices search.
      host_ne: what the searcher searches, read from its files; None where it lies in none.
    """

    def __init__(
        self,
        store: PassageStore,
        embedder: Embedder,
        spec: CorpusSpec,
        mesh: Mesh,
        retriever_tokens: bool | None,
        versions: Path | None = None,
    ) -> None:
        """Make a corpus that can be searched after `load_first` or `load_version`.

        Args:
          spec: the settings about the passages.
          retriever_tokens: whether the index on the devices holds them, see `to_device`; None =
            where it is rescored (`rounding.is_chosen`).
          versions: folder for the embeddings that are made here; None keeps them in memory.
        """
        self.store, self.version, self.encoder_hash, self.next_row = store, 0, "", 0
        config = spec.config
        self.dtype = searched_dtype(config, store, embedder.width)
        self.on_host = config.searcher == "scann"
        self.recall_target = config.recall_target
        self.index: DeviceIndex | None = None
        self.searcher: Searcher | None = None
        self._embedder, self._config, self._mesh = embedder, config, mesh
        self._spec = spec
        self._has_retriever_tokens, self._versions = retriever_tokens, versions
        self.states: ReaderStates | None = None
        self.host_ne: np.ndarray | None = None
        self._hot = HotRows(mesh)
        self._gather = jax.jit(
            lambda embeddings_ne, rows_r: gather_rows((embeddings_ne,), rows_r[None], mesh)[0][0]
        )

    @property
    def is_approximate(self) -> bool:
        """Whether a search may miss some of the best rows."""
        if isinstance(self.searcher, ScannSearcher):
            return self.searcher.is_approximate
        return self.recall_target < 1

    @property
    def _retriever_tokens(self) -> bool:
        """Whether the index on the devices holds them."""
        if self._has_retriever_tokens is None:
            return is_chosen(self._config, self.dtype)
        return self._has_retriever_tokens

    def rerank(self, told: int, k: int) -> int:
        """How many passages are searched and scored anew, for k that are wanted; 0 = none.

        Args:
          told: as bound, see `settled_rerank`.
        """
        made = settled_rerank(told, k, self._config, self.dtype)
        return made if told == made else min(made, max(k, self.store.count))

    @property
    def search_settings(self) -> dict[str, Any]:
        """What decides the recall of a search."""
        if self.on_host:
            return {"searcher": "scann", **dataclasses.asdict(self._spec.scann)}
        return {"searcher": "exact", "recall_target": self.recall_target}

    @property
    def saved_index(self) -> str:
        """CorpusConfig.index while its embeddings are those that are searched; else ""."""
        return self._config.index if self.version == 0 and self.encoder_hash else ""

    def load_first(self, params: Params) -> None:
        """Version 0: the saved index of CorpusConfig, or embeddings made by `params`.

        Raises:
          UserError: the saved index is of another corpus or another passage tower.
        """
        if self._config.index:
            found = self._embedder.hash(params)
            saved = load_embeddings(self._config.index, self.store, found)
            self._place(saved.embeddings_ne, 0, found, self._config.index)
        elif self._versions is None:
            self._place(
                self._embedder.to_memory(params, self.store), 0, self._embedder.hash(params)
            )
        else:
            self._make(params, 0, self._folder(0))

    def load_version(self, version: int, made_by: str) -> None:
        """Load the version that a checkpoint was searching; `made_by` is its encoder hash.

        Raises:
          UserError: this version no longer exists, or another encoder made it.
        """
        given = version == 0 and self._config.index
        folder = self._config.index if given else self._folder(version)
        saved = load_embeddings(folder, self.store, made_by)
        self._place(saved.embeddings_ne, version, made_by, folder)

    def refresh(self, params: Params, folder: Path | None = None) -> None:
        """Embed all passages anew with the present passage tower; the version counts up.

        The index keeps its type.

        Args:
          folder: where the new index is kept; None = with the run's other versions.

        Raises:
          UserError: it could not be written.
        """
        version = self.version + 1
        self._make(params, version, folder or self._folder(version))

    def roll(self, params: Params, rows: int) -> None:
        """Start to embed the next slice of so many passages anew, on the devices; do not wait.

        After the last row the next slice begins at row 0, and the version counts up.
        """
        assert self.index is not None
        count = self.store.count
        rows_r = ((self.next_row + np.arange(rows)) % count).astype(np.int32)
        embeddings_ne = self._embedder.refresh(params, self.index, rows_r)
        self.encoder_hash = ""
        self.version += (self.next_row + rows) // count
        self.next_row = (self.next_row + rows) % count
        version = multihost.place(np.int32(self.version), self.index.version.sharding)
        self.index = self.index.replace(embeddings_ne=embeddings_ne, version=version)  # type: ignore[attr-defined]

    def embeddings_of(self, rows_r: np.ndarray) -> Any:
        """Embeddings [r, e] as they are searched, of some rows; float32 for an int8 index."""
        if self.index is not None:
            return self._gather(self.index.embeddings_ne, rows_r)
        assert self.host_ne is not None
        return self.host_ne[rows_r]

    def notes(self) -> dict[str, Any]:
        """Notes for a checkpoint, with which the present embeddings are found again."""
        notes: dict[str, Any] = {"version": self.version, "encoder_hash": self.encoder_hash}
        if isinstance(self.store, LivingStore) and self.store.version["version"]:
            notes["store_version"] = self.store.version["version"]
        if self.own_embeddings is not None:
            notes["rolling"] = {
                "next_row": self.next_row,
                "dtype": self.dtype,
                "store_hash": self.store.retriever_hash,
            }
        return notes

    @property
    def own_embeddings(self) -> Any:
        """Embeddings that the checkpoint itself must hold, as no version on disk has them."""
        rolled = self.index is not None and not self.encoder_hash
        return self.index.embeddings_ne if rolled else None  # type: ignore[union-attr]

    def load_noted(self, notes: Mapping[str, Any], read: Callable[[Any], Any]) -> None:
        """Load the embeddings that a checkpoint was searching, by its `notes`.

        Args:
          read: reads the embeddings that the checkpoint holds itself, in the layout given.

        Raises:
          UserError: the embeddings no longer exist, belong to other passages, or were refreshed
            in slices, which a host searcher cannot search.
        """
        self._check_version(notes.get("store_version", 0))
        rolling = notes.get("rolling")
        if rolling is None:
            self.load_version(notes["version"], notes["encoder_hash"])
            return
        if self.on_host:
            raise UserError(
                "the checkpoint's index was refreshed in slices, which CorpusConfig.searcher = "
                "'scann' cannot search; use 'exact'"
            )
        if rolling["store_hash"] != self.store.retriever_hash:
            raise UserError(
                f"the checkpoint's index is of other passages than CorpusConfig.store = "
                f"{str(self.store.directory)!r} holds"
            )
        rows = max(self.store.count, self._config.capacity)
        layout = embeddings_layout(rows, self._embedder.width, rolling["dtype"], self._mesh)
        self.version, self.encoder_hash, self.next_row = notes["version"], "", rolling["next_row"]
        self.dtype = rolling["dtype"]
        self.index = self._to_device(read(layout), self.version)

    def _check_version(self, noted: int) -> None:
        """Refuse another version of the store than the one that a checkpoint searched."""
        found = self.store.version["version"] if isinstance(self.store, LivingStore) else 0
        if found != noted:
            raise UserError(
                f"the checkpoint searched version {noted} of {self.store.directory}, which now is "
                f"at version {found}; bind CorpusConfig.as_of = '{noted}' to go on with it"
            )

    def check_hot(self) -> None:
        """Refuse what cannot be changed while it is loaded.

        Raises:
          UserError: says what can.
        """
        if self.on_host and not self._config.index:
            raise UserError(
                "CorpusConfig.searcher = 'scann' can change only an index that is saved; build one "
                "with `atlas-jax build_index`, and bind CorpusConfig.index to it"
            )

    @property
    def capacity(self) -> int:
        """Rows that the index on the devices has room for."""
        assert self.index is not None
        return self._hot.capacity(self.index)

    @property
    def is_nearly_full(self) -> bool:
        """Whether little room is left."""
        return self.index is not None and self.store.count > _NEARLY * self.capacity

    def wider(self, count: int = 0) -> int:
        """Rows after the next growth, with room for ``count`` passages and more."""
        assert self.index is not None
        return self._hot.wider(self.index, count)

    def planned(self, rows: int) -> tuple["Corpus", Callable[[], None]]:
        """This corpus over shapes of so many rows in place of an index, to compile for that size.

        The second result compiles what grows it and changes it; any thread may call it.
        """
        assert self.index is not None
        made = copy.copy(self)
        made.index, compile_all = self._hot.planned(self.index, rows)
        return made, compile_all

    def grow(self, rows: int) -> None:
        """Make room for so many rows; nobody may search meanwhile."""
        assert self.index is not None
        self.index = self._hot.grown(self.index, rows)

    def swap(self, store: LivingStore, made: Fresh | None) -> Callable[[], None]:
        """Make ready to search the next version of the store.

        Args:
          store: the next version.
          made: of its new segment, None if it has none.

        Returns:
          What searches it from now on; to be called while nobody searches.
        """
        if not self.on_host:
            return functools.partial(self._write, store, made)
        found = self._beside(store, 0)
        return functools.partial(self._take, found, store)

    def _take(self, found: "Corpus", store: LivingStore) -> None:
        """Search on the host what another corpus searches."""
        assert isinstance(self.store, LivingStore)
        self.searcher, self.host_ne = found.searcher, found.host_ne
        self.store.become(store, store.places_n)

    def _write(self, store: LivingStore, made: Fresh | None) -> None:
        """Write what changed to the devices."""
        assert self.index is not None and isinstance(self.store, LivingStore)
        old = self.store
        gone = np.flatnonzero(~np.isin(old.places_n, store.places_n))
        fresh = 0 if made is None else len(made.embeddings_re)
        plan = moves(old.count, gone, fresh)
        if plan.count > self.capacity:
            if multihost.is_first():
                print(
                    f"{store.directory}: {plan.count:,} passages, more than the devices have rows "
                    f"({self.capacity:,}): they grow by a factor of {GROWTH}, and programs are "
                    "compiled anew",
                    file=sys.stderr,
                )
            self.grow(self.wider(plan.count))
        segment = store.segments[-1]
        width, at = self._embedder.width, slice(0, fresh)
        if made is None:
            made = Fresh(np.zeros((0, width), np.float32), np.zeros((0, 0), np.float16))
        new = (
            stored_as(made.embeddings_re, self.dtype),
            np.asarray(segment.reader_tokens_nl[at]),
            np.asarray(segment.retriever_tokens_nm[at]) if self._retriever_tokens else None,
            made.apart_rf if self.states else None,
        )
        self.index = self._hot.write(self.index, plan, new)
        places_r = store.starts[-2] + np.arange(fresh, dtype=np.int64)
        old.become(store, moved(old.places_n, places_r, plan))

    @property
    def keeps_earlier(self) -> bool:
        """Whether `earlier` can load a version."""
        return bool(self._config.index)

    def earlier(self, as_of: str) -> "Corpus":
        """This corpus as of a version or a time, with an index of the same shape beside this one's.

        Programs that were compiled for this corpus serve that one, too.

        Args:
          as_of: see `versions.find_version`.

        Raises:
          UserError: there is no such version, its embeddings are not saved, or it has no room.
        """
        config = self._config
        if not config.index:
            raise UserError(
                "as_of: the embeddings of earlier versions are not saved; build an index with "
                "`atlas-jax build_index`, and bind CorpusConfig.index to it"
            )
        assert isinstance(self.store, LivingStore)
        store = LivingStore.as_of(config.store, as_of, opened=self.store.segments)
        rows = 0 if self.on_host else self.capacity
        if store.count > rows and not self.on_host:
            raise UserError(
                f"as_of: version {store.version['version']} has {store.count:,} passages, but "
                f"there is room for {rows:,}; bind CorpusConfig.capacity = {store.count} or more"
            )
        made = self._beside(store, rows)
        if made.dtype != self.dtype:
            raise UserError(
                f"as_of: the saved embeddings of version {store.version['version']} are in "
                f"{made.dtype}, those that are searched in {self.dtype}"
            )
        return made

    def _beside(self, store: LivingStore, capacity: int) -> "Corpus":
        """This corpus with another version of the store and its saved embeddings."""
        config = dataclasses.replace(self._config, capacity=capacity)
        saved = load_embeddings(config.index, store, self.encoder_hash)
        spec = dataclasses.replace(self._spec, config=config)
        made = Corpus(store, self._embedder, spec, self._mesh, self._has_retriever_tokens)
        made.states = self.states
        made._place(saved.embeddings_ne, self.version, self.encoder_hash, config.index)
        return made

    def keep_versions(self, needed: Collection[int]) -> None:
        """Remove the embeddings of versions that no checkpoint needs and this run does not use."""
        if self._versions is None or not multihost.is_first():
            return
        versions = Objects(self._versions)
        for name in {name.partition("/")[0] for name in versions.names()}:
            if name.isdigit() and int(name) not in {*needed, self.version}:
                versions.remove(name)

    def _make(self, params: Params, version: int, folder: Path) -> None:
        made_by = self._embedder.to_directory(params, self.store, folder, version, self.dtype)
        saved = load_index(folder, self.store, made_by)
        self._place(saved.embeddings_ne, version, made_by, folder)

    def _folder(self, version: int) -> Path:
        assert self._versions is not None
        return self._versions / f"{version:06d}"

    def _place(
        self, embeddings_ne: Any, version: int, made_by: str, folder: str | Path | None = None
    ) -> None:
        """Search these embeddings, which lie in the index `folder` or in memory alone."""
        self.version, self.encoder_hash, self.next_row = version, made_by, 0
        self.dtype = dtype_of(embeddings_ne)
        if self.on_host:
            if self.dtype == INT8:
                raise UserError(
                    f"CorpusConfig.index = {self._config.index!r} is in int8, which "
                    "CorpusConfig.searcher = 'scann' would compress once more; build it with "
                    "CorpusConfig.dtype = 'bfloat16', or use 'exact'"
                )
            if folder is None:
                self.searcher = scann_in_memory(embeddings_ne, self._spec.scann)
            else:
                of_these = (self.store, embeddings_ne, self._spec.scann)
                self.searcher = scann_of_segments(folder, *of_these)
            # Embeddings in memory are dropped, unless this run trains: the searcher has a copy.
            kept = self._versions is not None or isinstance(embeddings_ne, np.memmap | Rows)
            self.host_ne = embeddings_ne if kept else None
            return
        self.index = None  # its memory is needed for its successor
        self.index = self._to_device(embeddings_ne, version)

    def _to_device(self, embeddings_ne: Any, version: int) -> DeviceIndex:
        return to_device(
            embeddings_ne,
            self.store,
            self._mesh,
            version,
            self._retriever_tokens,
            self.states.of(self.store) if self.states else None,
            self._config.capacity,
        )
