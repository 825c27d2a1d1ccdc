"""The passage store: the text of every index row, and its tokens for both models.

A store is built once for a corpus and its tokenizers. Then it is only read, a few rows at a time.
Neither building nor reading holds the corpus in memory. A store is a folder, on a disk or in a
bucket: manifest.json (counts, formats, lengths, tokenizers, content hashes, shards) and the files
of `shards.py`. Stores that earlier versions wrote have those of `flat_files.py`.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Protocol, TypedDict

import numpy as np
from msgspec import Meta

from atlas_jax.core import bounds, strict_json
from atlas_jax.core.errors import Interrupted, UserError
from atlas_jax.core.file_sets import Paths
from atlas_jax.core.jsonl import STRICT, RowsConfig
from atlas_jax.core.layouts import PassageFields
from atlas_jax.core.objects import Objects, place_of
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import NO_ROW, Passages
from atlas_jax.core.unique import hash_id
from atlas_jax.index.flat_files import FlatFiles
from atlas_jax.index.search import SearchResult
from atlas_jax.index.shard_writer import Recipe
from atlas_jax.index.shards import ShardedFiles
from atlas_jax.index.store_build import MANIFEST, Cut, build_files, corpus_hash_of, is_built_in
from atlas_jax.index.store_files import (
    STORE_FORMAT,
    StoreConfig,
    content_hashes,
    line_of,
    read_corpus,
)

_FLAT = 1  # format of the stores that earlier versions wrote


class TowerNotes(TypedDict):
    """The manifest's entry about one tower."""

    tokenizer: str
    format: str | tuple[str, ...]
    length: bounds.Length
    max_id: bounds.Count
    dtype: NotRequired[Literal["uint16", "int32"]]


class ShardEntry(TypedDict):
    """The manifest's entry about one shard."""

    name: Annotated[str, Meta(pattern=r"^[0-9]{5}-[0-9]{5}$")]
    rows: Annotated[int, Meta(ge=1, le=bounds.LARGEST)]


class Manifest(TypedDict):
    """The content of manifest.json; of format 1, it has neither shards, buckets nor types."""

    format: int
    count: Annotated[int, Meta(ge=1, le=bounds.LARGEST)]
    content_hash: str
    retriever_hash: str
    reader: TowerNotes
    retriever: TowerNotes
    buckets: NotRequired[Annotated[int, Meta(ge=1, le=1 << 16)]]
    shards: NotRequired[Annotated[list[ShardEntry], Meta(min_length=1)]]


class Files(Protocol):
    """The files of a store of any format."""

    def tokens(self, tower: str) -> Any:
        """The tokens of all rows [n, length], padded with 0."""

    def lines(self, rows: Sequence[int]) -> list[bytes]:
        """The lines of some rows."""

    def rows_of(self, hashed: int) -> list[int]:
        """The rows whose ids have this hash."""

    def text_of(self, row: int) -> str:
        """Where the text of a row lies, for messages."""

    def tokens_of(self, tower: str, row: int) -> str:
        """Where the tokens of a row lie, for messages."""


class _StoredPassage(TypedDict):
    id: str
    title: str
    section: str
    text: str


class PassageStore:
    """A built store, open for reading.

    Attributes:
      directory: where it lies.
      config: the formats and lengths it was built with.
      count: number of passages, n.
      reader_tokens_nl: reader tokens, read when they are asked for.
      retriever_tokens_nm: retriever tokens, as well.
      content_hash: of the corpus, both tokenizers and the config.
      retriever_hash: of all that embeddings depend on: the corpus and the retriever's half.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        reader, retriever = manifest["reader"], manifest["retriever"]
        self.config = StoreConfig(
            reader["format"], retriever["format"], reader["length"], retriever["length"]
        )
        self.count: int = manifest["count"]
        self.content_hash: str = manifest["content_hash"]
        self.retriever_hash: str = manifest["retriever_hash"]
        self._files = _files_of(directory, manifest)
        self.reader_tokens_nl: Any = self._files.tokens("reader")
        self.retriever_tokens_nm: Any = self._files.tokens("retriever")

    @classmethod
    def build(
        cls,
        passages_jsonl: Paths,
        directory: str | os.PathLike[str],
        reader_tokenizer: Tokenizer,
        retriever_tokenizer: Tokenizer,
        config: StoreConfig = StoreConfig(),
        rows: RowsConfig = STRICT,
        progress: bool = True,
        cut: Cut = Cut(),
    ) -> "PassageStore":
        """Build a store from jsonl files of {id, title?, section?, text}, plain or .gz.

        Other layouts, tables, texts, folders, patterns and lists of them are read as well
        (`core/file_sets.py`). All processes of a run must call it; each makes its share. A build
        that was killed goes on where it was. If a store of the same content exists, it is opened
        instead.

        Args:
          passages_jsonl: a file, folder or pattern, or several.
          cut: how the corpus is divided.

        Raises:
          UserError: names file and line for a broken line, text that is not UTF-8, a
            missing or empty field or an id used twice; or the corpus is empty, the
            directory holds something else, or the disk is full. Nothing is left behind.
        """
        tokenizers = {"reader": reader_tokenizer, "retriever": retriever_tokenizer}
        config = config.fitted()
        if is_built_in(directory):
            existing = cls.open(directory)
            existing._check_content(passages_jsonl, config, tokenizers, rows, progress)
            return existing
        build_files(passages_jsonl, directory, Recipe(config, tokenizers), rows, progress, cut)
        return cls.open(directory, reader_tokenizer, retriever_tokenizer)

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        reader_tokenizer: Tokenizer | None = None,
        retriever_tokenizer: Tokenizer | None = None,
    ) -> "PassageStore":
        """Open a store, checking that it was made with the given tokenizers.

        Raises:
          UserError: there is no store, it is damaged or of another version, or another
            tokenizer made it (both hashes are named).
        """
        objects = Objects(directory)
        path = objects.at(MANIFEST)
        try:
            raw = objects.read(MANIFEST)
            found: dict[str, Any] = strict_json.parse_as(raw, dict[str, Any], path)
        except Interrupted:  # it cannot be reached
            raise
        except UserError as error:
            raise UserError(
                f"{directory} is no passage store ({error}); build one with "
                "`python -m atlas_jax.build_index`"
            ) from error
        if found.get("format") not in (_FLAT, STORE_FORMAT):
            raise UserError(
                f"{path}: store format {bounds.shown(found.get('format'))}, this version reads "
                f"{_FLAT} and {STORE_FORMAT}; build the store anew"
            )
        manifest: Manifest = strict_json.convert(found, Manifest, path)
        given = {"reader": reader_tokenizer, "retriever": retriever_tokenizer}
        for tower, tokenizer in given.items():
            made_with = found[tower]["tokenizer"]
            if tokenizer is not None and tokenizer.content_hash != made_with:
                raise UserError(
                    f"{directory} was built with the {tower} tokenizer {made_with[:12]}, but the "
                    f"{tower} has {tokenizer.content_hash[:12]}; build a store for this {tower}"
                )
        return cls(place_of(directory), manifest)

    def passage(self, row: int) -> PassageFields:
        """The passage of an index row: its id, title, section and text.

        Raises:
          IndexError: no such row.
        """
        return self.passages([row])[0]

    def passages(self, rows: Sequence[int]) -> list[PassageFields]:
        """The passages of some rows, all read at the same time.

        Raises:
          IndexError: there is no such row.
        """
        outside = [row for row in rows if not 0 <= row < self.count]
        if outside:
            raise IndexError(f"row {outside[0]} of a store of {self.count} passages")
        lines = self._files.lines(rows)
        return [self._parsed(row, line) for row, line in zip(rows, lines, strict=True)]

    def _parsed(self, row: int, line: bytes) -> PassageFields:
        where = f"{self._files.text_of(row)}: row {row}"
        try:
            record: PassageFields = strict_json.parse_as(line, _StoredPassage, where)
        except UserError as error:
            raise UserError(f"{error}; remove the store and build it anew") from error
        return record

    def row_of(self, passage_id: str) -> int:
        """The index row of a passage id.

        Raises:
          UserError: no passage has this id.
        """
        row = self.find(passage_id)
        if row is None:
            raise UserError(f"{self.directory} has no passage with the id {passage_id!r}")
        return row

    def find(self, passage_id: str) -> int | None:
        """The index row of a passage id, or None."""
        for row in self._files.rows_of(hash_id(passage_id)):
            if self.passage(row)["id"] == passage_id:
                return row
        return None

    def check_vocab(self, **vocab_sizes: int) -> None:
        """Refuse token ids that a model's embedding table does not have.

        Args:
          vocab_sizes: `reader`, `retriever` or both: rows of their embedding tables.

        Raises:
          UserError: names the store, the tower, its greatest id and the vocabulary size.
        """
        for tower, size in vocab_sizes.items():
            greatest = self._notes(tower)["max_id"]
            if greatest >= size:
                raise UserError(
                    f"{self.directory} holds {tower} token id {greatest}, but the {tower} model's "
                    f"vocabulary has {size} ids (0 to {size - 1}); the store was made for another "
                    "model"
                )

    def gather_passages(self, result: SearchResult) -> Passages:
        """Fetch the tokens of found rows on the host; see ``exact.gather_passages``."""
        rows_bk = np.asarray(result.rows_bk)
        mask_bk = rows_bk != NO_ROW

        def take(tower: str, tokens: np.ndarray) -> np.ndarray:
            found = tokens[np.where(mask_bk, rows_bk, 0)].astype(np.int32)
            self.check_tokens(tower, found.reshape(-1, found.shape[-1]))
            return np.where(mask_bk[:, :, None], found, 0)

        return Passages(
            rows_bk=rows_bk,
            scores_bk=np.asarray(result.scores_bk),
            reader_tokens_bkl=take("reader", self.reader_tokens_nl),
            retriever_tokens_bkm=take("retriever", self.retriever_tokens_nm),
            mask_bk=mask_bk,
        )

    def check_tokens(self, tower: str, tokens: np.ndarray, first: int = 0) -> None:
        """Refuse token ids in this store that its tokenizer does not have.

        Args:
          tower: 'reader' or 'retriever'.
          tokens: some rows, as they were read.
          first: the number of the first of them.

        Raises:
          UserError: names the array's file, the row and the id.
        """
        greatest = self._notes(tower)["max_id"]
        if tokens.size and (tokens.max() > greatest or tokens.min() < 0):
            row = int(np.argmax(((tokens > greatest) | (tokens < 0)).any(axis=-1)))
            raise UserError(
                f"{self._tokens_of(tower, first + row)} is damaged: row {first + row} has other "
                f"token ids than 0 to {greatest}; remove the store and build it anew"
            )

    def _tokens_of(self, tower: str, row: int) -> str:
        """Where the tokens of a row lie, for messages."""
        return self._files.tokens_of(tower, row)

    def _notes(self, tower: str) -> TowerNotes:
        return self.manifest["reader"] if tower == "reader" else self.manifest["retriever"]

    def _check_content(
        self,
        passages: Paths,
        config: StoreConfig,
        tokenizers: Mapping[str, Tokenizer],
        rows: RowsConfig,
        progress: bool,
    ) -> None:
        """Refuse other passages than those of the store."""
        form = self.manifest["format"]
        if form == _FLAT:
            digest = hashlib.sha256()
            for _, record in read_corpus(passages, progress, rows):
                digest.update(line_of(record))
            corpus_hash = digest.hexdigest()
        else:
            corpus_hash = corpus_hash_of(passages, rows, progress)
        made_with = {tower: one.content_hash for tower, one in tokenizers.items()}
        wanted = content_hashes(corpus_hash, config, made_with, form)["content_hash"]
        self._check_hash(wanted, f"the passages of {passages}")

    def _check_hash(self, wanted: str, what: str) -> None:
        if self.content_hash != wanted:
            raise UserError(
                f"{self.directory} holds another store ({self.content_hash[:12]}) than {what} with "
                f"these tokenizers and StoreConfig give ({wanted[:12]}); remove it or choose "
                "another directory"
            )


def _files_of(directory: Path, manifest: Manifest) -> Files:
    lengths = {"reader": manifest["reader"], "retriever": manifest["retriever"]}
    widths = {tower: notes["length"] for tower, notes in lengths.items()}
    if manifest["format"] == _FLAT:
        return FlatFiles(directory, manifest["count"], widths)
    try:
        shards = [(one["name"], one["rows"]) for one in manifest["shards"]]
        towers = {tower: (notes["length"], notes["dtype"]) for tower, notes in lengths.items()}
        files = ShardedFiles(Objects(directory), shards, manifest["buckets"], towers)
    except KeyError as error:
        raise UserError(f"{directory}/{MANIFEST}: the field {error} is missing") from error
    if sum(files.counts) != manifest["count"] or manifest["buckets"].bit_count() != 1:
        raise UserError(
            f"{directory}/{MANIFEST}: its shards have {sum(files.counts)} rows, but count is "
            f"{manifest['count']}, or buckets is no power of 2"
        )
    return files
