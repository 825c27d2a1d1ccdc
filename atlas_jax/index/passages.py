"""The passage store: the text of every index row, and its tokens for both models.

A store is built once for a corpus and its tokenizers. Then it is only read, through memory maps.
Neither building nor reading holds the corpus in memory. A store is a folder:

    manifest.json         counts, formats, lengths, tokenizers and content hashes
    passages.jsonl        one {id, title, section, text} a line; the line is the index row
    offsets.npy           uint64 [n + 1], byte at which each line begins
    id_hashes.npy         uint64 [n], sorted hashes of the ids; id_rows.npy: their rows
    reader_tokens.npy     uint16 or int32 [n, l], no end token, padded with 0
    retriever_tokens.npy  uint16 or int32 [n, m], with special tokens, padded with 0
"""

import array
import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from msgspec import Meta

from atlas_jax.core import bounds, strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import STRICT, RowsConfig
from atlas_jax.core.parts import PARTS
from atlas_jax.core.paths import as_path, expect_bytes, input_file
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import NO_ROW, Passages
from atlas_jax.core.unique import hash_id
from atlas_jax.core.whole import whole_folder
from atlas_jax.index.files import open_npy
from atlas_jax.index.search import SearchResult
from atlas_jax.index.store_files import (
    STORE_FORMAT,
    Record,
    StoreConfig,
    content_hashes,
    copy_corpus,
    line_of,
    read_corpus,
    tokenise,
    write_manifest,
)
from atlas_jax.index.unknown import check_scripts

_TEXT = "passages.jsonl"


class TowerNotes(TypedDict):
    """The manifest's entry about one tower."""

    tokenizer: str
    format: str | tuple[str, ...]
    length: bounds.Length
    max_id: bounds.Count


class Manifest(TypedDict):
    """The content of manifest.json."""

    format: int
    count: Annotated[int, Meta(ge=1, le=bounds.LARGEST)]
    content_hash: str
    retriever_hash: str
    reader: TowerNotes
    retriever: TowerNotes


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
      reader_tokens_nl: memory-mapped reader tokens.
      retriever_tokens_nm: memory-mapped retriever tokens.
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
        self.reader_tokens_nl = self._tokens("reader", reader)
        self.retriever_tokens_nm = self._tokens("retriever", retriever)
        self._offsets = self._array("offsets", (self.count + 1,), np.uint64)
        self._id_hashes = self._array("id_hashes", (self.count,), np.uint64)
        self._id_rows = self._array("id_rows", (self.count,), np.int64)
        self._text = self._mapped_text()
        self._check_order()

    @classmethod
    def build(
        cls,
        passages_jsonl: str | os.PathLike[str],
        directory: str | os.PathLike[str],
        reader_tokenizer: Tokenizer,
        retriever_tokenizer: Tokenizer,
        config: StoreConfig = StoreConfig(),
        rows: RowsConfig = STRICT,
        progress: bool = True,
    ) -> "PassageStore":
        """Build a store from a jsonl file of {id, title?, section?, text}, plain or .gz.

        Other layouts, tables, texts, folders and patterns are read as well (`core/file_sets.py`).

        Two streaming passes: the file is checked and copied, then tokenised. If a store of the
        same content exists, it is opened instead.

        Raises:
          UserError: names file and line for a broken line, text that is not UTF-8, a
            missing or empty field or an id used twice; or the corpus is empty, the
            directory holds something else, or the disk is full. Nothing is left behind.
        """
        tokenizers = {"reader": reader_tokenizer, "retriever": retriever_tokenizer}
        config = config.fitted()
        existing = cls.open(directory) if (Path(directory) / "manifest.json").exists() else None
        if existing:
            digest = hashlib.sha256()
            for _, record in read_corpus(passages_jsonl, progress, rows):
                digest.update(line_of(record))
            corpus_hash = digest.hexdigest()
            wanted = content_hashes(corpus_hash, config, tokenizers)["content_hash"]
            existing._check_hash(wanted, f"the passages of {passages_jsonl}")
            return existing
        with whole_folder(directory) as folder:
            # File and line of each row, for the error about two equal ids.
            lines, numbers, files = array.array("Q"), array.array("L"), dict[str, int]()

            def records() -> Iterator[Record]:
                for (file, line), record in read_corpus(passages_jsonl, progress, rows):
                    lines.append(line)
                    numbers.append(files.setdefault(file, len(files)))
                    yield record

            corpus_hash = copy_corpus(
                folder, records(), lambda row: f"{list(files)[numbers[row]]}:{lines[row]}"
            )
            if not lines:
                raise UserError(f"{passages_jsonl} holds no passages")
            check_scripts(folder, len(lines), tokenizers)
            towers = {
                tower: tokenise(folder, len(lines), tower, config, tokenizers[tower], progress)
                for tower in PARTS
            }
            hashes = content_hashes(corpus_hash, config, tokenizers)
            write_manifest(folder, {"count": len(lines), **hashes, **towers})
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
        path = as_path(directory) / "manifest.json"
        try:
            found: dict[str, Any] = strict_json.read(path, dict[str, Any])
        except UserError as error:
            raise UserError(
                f"{directory} is no passage store ({error}); build one with "
                "`python -m atlas_jax.build_index`"
            ) from error
        if found.get("format") != STORE_FORMAT:
            raise UserError(
                f"{path}: store format {bounds.shown(found.get('format'))}, this version reads "
                f"{STORE_FORMAT}; build the store anew"
            )
        manifest: Manifest = strict_json.convert(found, Manifest, str(path))
        given = {"reader": reader_tokenizer, "retriever": retriever_tokenizer}
        for tower, tokenizer in given.items():
            made_with = found[tower]["tokenizer"]
            if tokenizer is not None and tokenizer.content_hash != made_with:
                raise UserError(
                    f"{directory} was built with the {tower} tokenizer {made_with[:12]}, but the "
                    f"{tower} has {tokenizer.content_hash[:12]}; build a store for this {tower}"
                )
        return cls(Path(directory), manifest)

    def passage(self, row: int) -> Record:
        """The passage of an index row: its id, title, section and text.

        Raises:
          IndexError: no such row.
        """
        if not 0 <= row < self.count:
            raise IndexError(f"row {row} of a store of {self.count} passages")
        raw = self._text[self._offsets[row] : self._offsets[row + 1]].tobytes()
        where = f"{self.directory / _TEXT}: row {row}"
        record: Record = strict_json.parse_as(raw, _StoredPassage, where)
        return record

    def passages(self, rows: Sequence[int]) -> list[Record]:
        """The passages of some rows, whose bytes are asked for together before the first is read.

        Raises:
          IndexError: there is no such row.
        """
        self._expect(rows)
        return [self.passage(row) for row in rows]

    def _expect(self, rows: Sequence[int]) -> None:
        """Ask for the text of some rows; without its file, what is mapped is read all the same."""
        at = self._offsets
        with contextlib.suppress(OSError), (self.directory / _TEXT).open("rb") as file:
            expect_bytes(file.fileno(), ((int(at[row]), int(at[row + 1])) for row in rows))

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
        hashed = hash_id(passage_id)
        at = int(np.searchsorted(self._id_hashes, np.uint64(hashed)))
        while at < self.count and int(self._id_hashes[at]) == hashed:
            row = int(self._id_rows[at])
            if self.passage(row)["id"] == passage_id:
                return row
            at += 1
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
            raise self._damaged(
                self.directory / f"{tower}_tokens.npy",
                f"row {first + row} has other token ids than 0 to {greatest}",
            )

    def _tokens(self, tower: str, notes: TowerNotes) -> np.ndarray:
        # The vocabulary decides the type, and the manifest does not tell its size.
        return self._array(f"{tower}_tokens", (self.count, notes["length"]), np.uint16, np.int32)

    def _notes(self, tower: str) -> TowerNotes:
        return self.manifest["reader"] if tower == "reader" else self.manifest["retriever"]

    def _array(self, name: str, shape: tuple[int, ...], *dtypes: type) -> np.ndarray:
        path = self.directory / f"{name}.npy"
        try:
            return open_npy(path, shape, *dtypes)
        except UserError as error:
            raise self._damaged(path, str(error).removeprefix(f"{path}: ")) from error

    def _mapped_text(self) -> np.ndarray:
        path = self.directory / _TEXT
        if input_file(path).stat().st_size != self._offsets[-1] or not self._offsets[-1]:
            raise self._damaged(path, f"it has not the {self._offsets[-1]} bytes of offsets.npy")
        return np.memmap(path, np.uint8, mode="r")

    def _check_order(self) -> None:
        """One look at the arrays that lead to others."""
        if self._offsets[0] != 0 or not (self._offsets[1:] > self._offsets[:-1]).all():
            raise self._damaged(self.directory / "offsets.npy", "it does not ascend from 0")
        if not (self._id_hashes[1:] >= self._id_hashes[:-1]).all():
            raise self._damaged(self.directory / "id_hashes.npy", "it does not ascend")
        if self._id_rows.min() < 0 or self._id_rows.max() >= self.count:
            raise self._damaged(
                self.directory / "id_rows.npy", f"it has other rows than 0 to {self.count - 1}"
            )

    def _damaged(self, path: Path, problem: str) -> UserError:
        return UserError(
            f"{path} is missing or not as {self.directory / 'manifest.json'} describes it "
            f"({problem}); remove the store and build it anew"
        )

    def _check_hash(self, wanted: str, what: str) -> None:
        if self.content_hash != wanted:
            raise UserError(
                f"{self.directory} holds another store ({self.content_hash[:12]}) than {what} with "
                f"these tokenizers and StoreConfig give ({wanted[:12]}); remove it or choose "
                "another directory"
            )
