"""The passage store: the text of every index row, and its tokens for both models.

Built once per corpus and tokenizers, then only read, through memory maps: neither
building nor reading holds the corpus in memory. A store is a folder:

    manifest.json         counts, formats, lengths, tokenizers and content hashes
    passages.jsonl        one {id, title, section, text} a line; the line is the index row
    offsets.npy           uint64 [n + 1], byte at which each line begins
    id_hashes.npy         uint64 [n], sorted hashes of the ids; id_rows.npy: their rows
    reader_tokens.npy     uint16 or int32 [n, l], no end token, padded with 0
    retriever_tokens.npy  uint16 or int32 [n, m], with special tokens, padded with 0
"""

import array
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import STRICT, RowsConfig
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import NO_ROW, Passages
from atlas_jax.index.files import new_directory
from atlas_jax.index.search import SearchResult
from atlas_jax.index.store_files import (
    STORE_FORMAT,
    TOWERS,
    Record,
    StoreConfig,
    content_hashes,
    copy_corpus,
    encode,
    hash_id,
    line_of,
    normalise,
    read_corpus,
    tokenise,
    write_manifest,
)
from atlas_jax.index.unknown import check_scripts


class PassageStore:
    """A built store, open for reading.

    Attributes:
      directory: where it lies.
      config: the formats and lengths it was built with.
      count: number of passages, n.
      reader_tokens_nl: memory-mapped reader tokens.
      retriever_tokens_nm: memory-mapped retriever tokens.
      content_hash: of the corpus, both tokenizers and the config.
      retriever_hash: of what embeddings depend on: the corpus and the retriever's half.
    """

    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.config = _config_of(manifest)
        self.count: int = manifest["count"]
        self.content_hash: str = manifest["content_hash"]
        self.retriever_hash: str = manifest["retriever_hash"]
        self.reader_tokens_nl = self._array(
            "reader_tokens", (self.count, self.config.reader_length)
        )
        self.retriever_tokens_nm = self._array(
            "retriever_tokens", (self.count, self.config.retriever_length)
        )
        self._offsets = self._array("offsets", (self.count + 1,))
        self._id_hashes = self._array("id_hashes", (self.count,))
        self._id_rows = self._array("id_rows", (self.count,))
        text_file = directory / "passages.jsonl"
        if not text_file.is_file() or text_file.stat().st_size != self._offsets[-1]:
            raise self._damaged(text_file)
        self._text = np.memmap(text_file, np.uint8, mode="r")

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

        Two passes, both streaming: the file is checked and copied, then tokenised. A store
        of the same content that is there already is opened instead.

        Raises:
          UserError: names file and line for a broken line, text that is not UTF-8, a
            missing or empty field or an id used twice; or the corpus is empty, the
            directory holds something else, or the disk is full. Nothing is left behind.
        """
        tokenizers = {"reader": reader_tokenizer, "retriever": retriever_tokenizer}
        existing = cls.open(directory) if (Path(directory) / "manifest.json").exists() else None
        if existing:
            digest = hashlib.sha256()
            for _, record in read_corpus(passages_jsonl, progress, rows):
                digest.update(line_of(record))
            corpus_hash = digest.hexdigest()
            wanted = content_hashes(corpus_hash, config, tokenizers)["content_hash"]
            existing._check_hash(wanted, f"the passages of {passages_jsonl}")
            return existing
        with new_directory(directory) as folder:
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
                for tower in TOWERS
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
        path = Path(directory) / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{directory} is no passage store ({error}); build one with "
                "`python -m atlas_jax.build_index`"
            ) from error
        if manifest.get("format") != STORE_FORMAT:
            raise UserError(
                f"{path}: store format {manifest.get('format')}, this version reads "
                f"{STORE_FORMAT}; build the store anew"
            )
        given = {"reader": reader_tokenizer, "retriever": retriever_tokenizer}
        for tower, tokenizer in given.items():
            made_with = manifest[tower]["tokenizer"]
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
        record: Record = json.loads(
            self._text[self._offsets[row] : self._offsets[row + 1]].tobytes()
        )
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
            greatest = self.manifest[tower]["max_id"]
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

        def take(tokens: np.ndarray) -> np.ndarray:
            found = tokens[np.where(mask_bk, rows_bk, 0)].astype(np.int32)
            return np.where(mask_bk[:, :, None], found, 0)

        return Passages(
            rows_bk=rows_bk,
            scores_bk=np.asarray(result.scores_bk),
            reader_tokens_bkl=take(self.reader_tokens_nl),
            retriever_tokens_bkm=take(self.retriever_tokens_nm),
            mask_bk=mask_bk,
        )

    def replace(
        self,
        passages: Sequence[Mapping[str, Any]],
        directory: str | os.PathLike[str],
        reader_tokenizer: Tokenizer,
        retriever_tokenizer: Tokenizer,
    ) -> "PassageStore":
        """Write a new store in which some passages have other text; this one stays.

        Rows keep their places, so only the rows of the given ids need new embeddings.

        Args:
          passages: {id, title?, section?, text}; each id has to be in this store.
          directory: of the new store.

        Raises:
          UserError: an id that the store lacks, a missing field, other tokenizers than
            the store's, or the directory cannot be written.
        """
        tokenizers = {"reader": reader_tokenizer, "retriever": retriever_tokenizer}
        PassageStore.open(self.directory, **{f"{t}_tokenizer": tokenizers[t] for t in TOWERS})
        changed: dict[int, Record] = {}
        for number, passage in enumerate(passages):
            record = normalise(passage, f"replacement {number}")
            changed[self.row_of(record["id"])] = record
        with new_directory(directory) as folder:
            everything = (changed.get(row) or self.passage(row) for row in range(self.count))
            corpus_hash = copy_corpus(folder, everything, lambda row: f"row {row}")
            hashes = content_hashes(corpus_hash, self.config, tokenizers)
            manifest = {**self.manifest, **hashes}
            for tower in TOWERS:
                name = f"{tower}_tokens.npy"
                shutil.copyfile(self.directory / name, folder / name)
                tokens = np.load(folder / name, mmap_mode="r+")
                fresh = encode(list(changed.values()), tower, self.config, tokenizers[tower])
                tokens[list(changed)] = fresh
                tokens.flush()
                greatest = max(manifest[tower]["max_id"], int(fresh.max(initial=0)))
                manifest[tower] = {**manifest[tower], "max_id": greatest}
            write_manifest(folder, manifest)
        return PassageStore.open(directory)

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        path = self.directory / f"{name}.npy"
        try:
            found: np.ndarray = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise self._damaged(path) from error
        if found.shape != shape:
            raise self._damaged(path)
        return found

    def _damaged(self, path: Path) -> UserError:
        return UserError(
            f"{path} is missing or not as {self.directory / 'manifest.json'} describes it; "
            "remove the store and build it anew"
        )

    def _check_hash(self, wanted: str, what: str) -> None:
        if self.content_hash != wanted:
            raise UserError(
                f"{self.directory} holds another store ({self.content_hash[:12]}) than {what} with "
                f"these tokenizers and StoreConfig give ({wanted[:12]}); remove it or choose "
                "another directory"
            )


def _config_of(manifest: Mapping[str, Any]) -> StoreConfig:
    fields: dict[str, Any] = {
        f"{t}_{key}": manifest[t][key] for t in TOWERS for key in ("format", "length")
    }
    for name, value in fields.items():
        if isinstance(value, list):  # several formats: JSON has no tuples
            fields[name] = tuple(value)
    return StoreConfig(**fields)
