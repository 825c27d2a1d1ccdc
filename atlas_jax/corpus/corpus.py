"""The corpus of a run: its passage store, and the index over it, fresh or stale.

A run keeps the embeddings that it makes in versions/<version>/. A checkpoint notes the version that
was searched. After a slice has been refreshed the embeddings are no longer those of any version;
then the checkpoint holds them itself. So a resumed run searches exactly what the killed run did.
"""

import dataclasses
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from atlas_jax.core import multihost
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import DeviceIndex, Params
from atlas_jax.corpus.config import CorpusSpec
from atlas_jax.corpus.embedder import Embedder
from atlas_jax.corpus.reader_states import PassageReader, reader_states
from atlas_jax.index.exact import gather_rows
from atlas_jax.index.hot import GROWTH, HotRows, moved, moves
from atlas_jax.index.int8 import INT8, dtype_of, stored_as
from atlas_jax.index.living import LivingStore
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.placement import embeddings_layout, to_device
from atlas_jax.index.saved import load_index
from atlas_jax.index.scann_search import ScannSearcher
from atlas_jax.index.search import Searcher
from atlas_jax.index.segment_indices import load_embeddings
from atlas_jax.index.versions import numbers_of
from atlas_jax.models.assembly import Tokenizers
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.dual_encoder import DualEncoder

_NEARLY = 0.9  # of the capacity


def open_store(spec: CorpusSpec, tokenizers: Tokenizers) -> LivingStore:
    """Open the store as of the version that is told, or build it from the passages.

    If both are bound and the store exists, it must hold exactly these passages, formatted as
    StoreConfig says. A store that was changed since is not compared with them any more.

    Raises:
      UserError: neither store nor passages are bound, the store was made for other
        tokenizers or from other passages, or it has no such version.
    """
    config = spec.config
    if not config.store:
        raise UserError("CorpusConfig.store is not given: bind it to the passage store's directory")
    if config.passages and not numbers_of(config.store):
        with multihost.first_goes_first("passage store"):
            PassageStore.build(
                config.passages,
                config.store,
                tokenizers.reader,
                tokenizers.retriever,
                spec.formats,
                spec.rows,
            )
    elif not (Path(config.store) / "manifest.json").exists():
        raise UserError(
            f"CorpusConfig.store = {config.store!r} holds no passage store yet: bind "
            "CorpusConfig.passages to a jsonl corpus to build it"
        )
    towers = tokenizers.reader, tokenizers.retriever
    return LivingStore.as_of(config.store, str(config.as_of), *towers)


def check_store(store: PassageStore, retriever: DualEncoder, reader: T5 | None = None) -> None:
    """Refuse a store whose passages the models cannot read.

    Args:
      reader: None where nothing is read.

    Raises:
      UserError: token ids that a model has not, or passages longer than the retriever can read.
    """
    store.check_vocab(retriever=retriever.config.vocab_size)
    if reader is not None:
        store.check_vocab(reader=reader.config.vocab_size)
    most = retriever.config.max_length
    if store.retriever_tokens_nm[:, most:].any():
        raise UserError(
            f"{store.directory} holds passages of more than {most} retriever tokens, which is all "
            "that the retriever can read; build a store with StoreConfig.retriever_length = "
            f"{most} or less"
        )


def make_corpus(
    spec: CorpusSpec,
    store: PassageStore,
    retriever: DualEncoder,
    tokenizer: Tokenizer,
    mesh: Mesh,
    rules: tuple[Rule, ...],
    retriever_tokens: bool,
    reader: T5 | None = None,
    versions: Path | None = None,
) -> "Corpus":
    """The corpus of an open store; its index and the reader's states are loaded later.

    Args:
      tokenizer: of the retriever.
      retriever_tokens, versions: see `Corpus`.
      reader: None where nothing is read.

    Raises:
      UserError: the store is of other models, or a setting is at fault.
    """
    check_store(store, retriever, reader)
    embedder = Embedder(retriever, tokenizer, spec.config, mesh, rules)
    return Corpus(store, embedder, spec, mesh, retriever_tokens, versions)


def load_corpus(
    spec: CorpusSpec,
    retriever: DualEncoder,
    params: Params,
    tokenizers: Tokenizers,
    mesh: Mesh,
    rules: tuple[Rule, ...],
    retriever_tokens: bool,
    reader: PassageReader | None = None,
) -> "Corpus":
    """The corpus of a run that does not train, with its index.

    Args:
      params: of the retriever.
      retriever_tokens: see `Corpus`.
      reader: None where nothing is read.

    Raises:
      UserError: store or index are of other models, or a setting is at fault.
    """
    store, tokenizer = open_store(spec, tokenizers), tokenizers.retriever
    model = reader.model if reader else None
    corpus = make_corpus(spec, store, retriever, tokenizer, mesh, rules, retriever_tokens, model)
    if reader is not None:
        corpus.apart_nf = reader_states(spec.config, store, reader)
    corpus.load_first(params)
    return corpus


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
      apart_nf: the reader's states of the passages, see `reader_states`; to be set before an index
        is loaded.
      searcher: on the host; None when the devices search.
      host_ne: what the searcher searches, memory-mapped; None where it lies in no file.
    """

    def __init__(
        self,
        store: PassageStore,
        embedder: Embedder,
        spec: CorpusSpec,
        mesh: Mesh,
        retriever_tokens: bool,
        versions: Path | None = None,
    ) -> None:
        """Make a corpus that can be searched after `load_first` or `load_version`.

        Args:
          spec: the settings about the passages.
          retriever_tokens: whether the index on the devices holds them, see `to_device`.
          versions: folder for the embeddings that are made here; None keeps them in memory.
        """
        self.store, self.version, self.encoder_hash, self.next_row = store, 0, "", 0
        config = spec.config
        self.dtype, self.on_host = config.dtype, config.searcher == "scann"
        self.recall_target = config.recall_target
        self.index: DeviceIndex | None = None
        self.searcher: Searcher | None = None
        self._embedder, self._config, self._mesh = embedder, config, mesh
        self._spec = spec
        self._retriever_tokens, self._versions = retriever_tokens, versions
        self.apart_nf: np.ndarray | None = None
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

    def load_first(self, params: Params) -> None:
        """Version 0: the saved index of CorpusConfig, or embeddings made by `params`.

        Raises:
          UserError: the saved index is of another corpus or another passage tower.
        """
        if self._config.index:
            found = self._embedder.hash(params)
            saved = load_embeddings(self._config.index, self.store, found)
            self._place(saved.embeddings_ne, 0, found)
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
        self._place(saved.embeddings_ne, version, made_by)

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
        if self.on_host:
            raise UserError(
                "CorpusConfig.searcher = 'scann' cannot change its index; use 'exact', or "
                "`atlas-jax index` and load it again"
            )
        if self.apart_nf is not None:
            raise UserError(
                "the reader keeps states of the passages, which cannot be changed while they are "
                "loaded; use `atlas-jax index` and load it again"
            )

    def room_for(self, store: LivingStore, rows: int) -> bool:
        """Whether a later version of the store fits; tells when it is nearly full, or too full."""
        assert self.index is not None
        capacity = self._hot.capacity(self.index)
        if rows > capacity:
            print(
                f"{store.directory}: {rows:,} passages, more than the {capacity:,} rows on the "
                f"devices; they grow by a factor of {GROWTH}, and programs are compiled anew",
                file=sys.stderr,
            )
        elif rows > _NEARLY * capacity >= self.store.count:
            print(
                f"{store.directory}: {rows:,} of {capacity:,} rows on the devices are in use; see "
                "CorpusConfig.capacity",
                file=sys.stderr,
            )
        return rows <= capacity

    def swap(self, store: LivingStore, fresh_re: np.ndarray | None) -> None:
        """Search the next version of the store instead; nobody may search meanwhile.

        Args:
          store: the next version.
          fresh_re: float32 embeddings of its new segment, None if it has none.
        """
        assert self.index is not None and isinstance(self.store, LivingStore)
        old = self.store
        gone = np.flatnonzero(~np.isin(old.places_n, store.places_n))
        fresh = 0 if fresh_re is None else len(fresh_re)
        plan = moves(old.count, gone, fresh)
        if not self.room_for(store, plan.count):
            self.index = self._hot.grown(self.index, plan.count)
        segment = store.segments[-1]
        width, at = self._embedder.width, slice(0, fresh)
        rows_re = np.zeros((0, width), np.float32) if fresh_re is None else fresh_re
        new = (
            stored_as(rows_re, self.dtype),
            np.asarray(segment.reader_tokens_nl[at]),
            np.asarray(segment.retriever_tokens_nm[at]) if self._retriever_tokens else None,
        )
        self.index = self._hot.write(self.index, plan, new)
        places_r = store.starts[-2] + np.arange(fresh, dtype=np.int64)
        old.become(store, moved(old.places_n, places_r, plan))

    @property
    def keeps_earlier(self) -> bool:
        """Whether `earlier` can load a version."""
        return bool(self._config.index) and not self.on_host and self.apart_nf is None

    def earlier(self, as_of: str) -> "Corpus":
        """This corpus as of a version or a time, with an index of the same shape beside this one's.

        Programs that were compiled for this corpus serve that one, too.

        Args:
          as_of: see `versions.find_version`.

        Raises:
          UserError: there is no such version, its embeddings are not saved, or it has no room.
        """
        config = self._config
        if self.on_host or self.apart_nf is not None:
            raise UserError(
                "as_of: an earlier version can be searched beside the newest one only where the "
                "devices search and the reader keeps no states of the passages; load it by itself"
            )
        if not config.index:
            raise UserError(
                "as_of: the embeddings of earlier versions are not saved; build an index with "
                "`atlas-jax build_index`, and bind CorpusConfig.index to it"
            )
        assert self.index is not None and isinstance(self.store, LivingStore)
        rows, open_segments = self._hot.capacity(self.index), self.store.segments
        store = LivingStore.as_of(config.store, as_of, opened=open_segments)
        if store.count > rows:
            raise UserError(
                f"as_of: version {store.version['version']} has {store.count:,} passages, but "
                f"there is room for {rows:,}; bind CorpusConfig.capacity = {store.count} or more"
            )
        saved = load_embeddings(config.index, store, self.encoder_hash)
        spec = dataclasses.replace(self._spec, config=dataclasses.replace(config, capacity=rows))
        made = Corpus(store, self._embedder, spec, self._mesh, self._retriever_tokens)
        made._place(saved.embeddings_ne, self.version, self.encoder_hash)
        if made.dtype != self.dtype:
            raise UserError(
                f"as_of: the saved embeddings of version {store.version['version']} are in "
                f"{made.dtype}, those that are searched in {self.dtype}"
            )
        return made

    def keep_versions(self, needed: Collection[int]) -> None:
        """Remove the embeddings of versions that no checkpoint needs and this run does not use."""
        if self._versions is None or not self._versions.is_dir() or not multihost.is_first():
            return
        for folder in self._versions.iterdir():
            if folder.name.isdigit() and int(folder.name) not in {*needed, self.version}:
                shutil.rmtree(folder)

    def _make(self, params: Params, version: int, folder: Path) -> None:
        made_by = self._embedder.to_directory(params, self.store, folder, version, self.dtype)
        self._place(load_index(folder, self.store, made_by).embeddings_ne, version, made_by)

    def _folder(self, version: int) -> Path:
        assert self._versions is not None
        return self._versions / f"{version:06d}"

    def _place(self, embeddings_ne: Any, version: int, made_by: str) -> None:
        self.version, self.encoder_hash, self.next_row = version, made_by, 0
        self.dtype = dtype_of(embeddings_ne)
        if self.on_host:
            if self.dtype == INT8:
                raise UserError(
                    f"CorpusConfig.index = {self._config.index!r} is in int8, which "
                    "CorpusConfig.searcher = 'scann' would compress once more; build it with "
                    "CorpusConfig.dtype = 'bfloat16', or use 'exact'"
                )
            self.searcher = ScannSearcher(embeddings_ne, self._spec.scann)
            # Embeddings in memory are dropped, unless this run trains: the searcher has a copy.
            kept = self._versions is not None or isinstance(embeddings_ne, np.memmap)
            self.host_ne = embeddings_ne if kept else None
            return
        self.index = None  # its memory is needed for its successor
        self.index = self._to_device(embeddings_ne, version)

    def _to_device(self, embeddings_ne: Any, version: int) -> DeviceIndex:
        placed = to_device(
            embeddings_ne,
            self.store,
            self._mesh,
            version,
            self._retriever_tokens,
            self.apart_nf,
            self._config.capacity,
        )
        if isinstance(self.store, LivingStore):
            self.store.forget_copies()
        return placed
