"""Writes the files of a passage store; `passages.py` describes them."""

import array
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError
from atlas_jax.core.file_sets import Place, read_passages
from atlas_jax.core.formats import check_format, fill
from atlas_jax.core.jsonl import STRICT, FieldTypes, RowsConfig, check_fields
from atlas_jax.core.layouts import Layout
from atlas_jax.core.parts import PARTS
from atlas_jax.core.progress import show_progress
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.unique import hash_id, repeated
from atlas_jax.index.files import create_npy

FIELDS = ("id", "title", "section", "text")
STORE_FORMAT = 1
_REQUIRED: FieldTypes = {"id": (str, int), "text": str}
_OPTIONAL: FieldTypes = {"title": str, "section": str}
LONGEST = 1 << 20  # tokens of a passage, where no model says less
_BATCH = 1024  # passages per call of a tokenizer

Record = dict[str, str]


@dataclasses.dataclass(frozen=True)
class StoreConfig:
    """The part of a passage that each model sees.

    Several formats may be given. A passage uses the first format for which it has all fields, else
    the last one. So a retriever that reads titles and sections can also read passages without them.

    Attributes:
      reader_format: the reader's text; any of {id}, {title}, {section}, {text}.
      retriever_format: the retriever's text.
      reader_length: reader tokens kept of a passage.
      retriever_length: retriever tokens kept, special tokens included; 0 = as many as
        reader_length, or as many as the retriever has positions, if these are fewer.
    """

    reader_format: str | tuple[str, ...] = "title: {title} context: {text}"
    retriever_format: str | tuple[str, ...] = "{title} {text}"
    reader_length: bounds.Length = 192
    retriever_length: bounds.LengthOrModels = 0

    def __post_init__(self) -> None:
        """Refuse formats with unknown fields and lengths below 1.

        Raises:
          UserError: names the binding at fault.
        """
        bounds.check(self)
        for tower in PARTS:
            name = f"StoreConfig.{tower}_format"
            if not self._formats(tower):
                raise UserError(f"{name} = (): expected at least one format")
            for template in self._formats(tower):
                if not check_format(name, template, FIELDS):
                    raise UserError(
                        f"{name} = {template!r} needs at least one of the fields "
                        f"{', '.join(f'{{{field}}}' for field in FIELDS)}"
                    )

    def fitted(self, longest: int = LONGEST) -> "StoreConfig":
        """With the retriever's length as a number.

        Args:
          longest: tokens of the longest text that the retriever takes.

        Raises:
          UserError: the length that was told is more than that.
        """
        if self.retriever_length > longest:
            raise UserError(
                f"StoreConfig.retriever_length = {self.retriever_length}: the retriever takes "
                f"texts of at most {longest} tokens; bind {longest} or less, or 0 for as many as "
                "it takes"
            )
        length = self.retriever_length or min(self.reader_length, longest)
        return dataclasses.replace(self, retriever_length=length)

    def text(self, tower: str, passage: Mapping[str, Any]) -> str:
        """The text that one tower reads of a passage."""
        *rather, last = self._formats(tower)
        for template in rather:
            if all(str(passage[name]).strip() for name in _fields_of(template)):
                return fill(template, **passage)
        return fill(last, **passage)

    def _formats(self, tower: str) -> tuple[str, ...]:
        formats = getattr(self, f"{tower}_format")
        return (formats,) if isinstance(formats, str) else formats


@functools.lru_cache(maxsize=64)
def _fields_of(template: str) -> tuple[str, ...]:
    return check_format("StoreConfig", template, FIELDS)


def read_corpus(
    path: str | os.PathLike[str], progress: bool, rows: RowsConfig = STRICT
) -> Iterator[tuple[Place, Record]]:
    """File, line and checked record of every passage of a file, folder or pattern."""

    def check(file: str, line: int, record: Mapping[str, Any], layout: Layout | None) -> None:
        _check_filled(record, f"{file}:{line}", layout.called if layout else None)

    records = read_passages(path, check, rows)
    for place, record in show_progress("read passages", records, shown=progress):
        yield place, _strings(record)


def normalise(record: Mapping[str, Any], where: str) -> Record:
    """The four fields of a passage as strings; an error begins with ``where``."""
    check_fields(record, _REQUIRED, _OPTIONAL, where)
    _check_filled(record, where)
    return _strings(record)


def _strings(record: Mapping[str, Any]) -> Record:
    return {field: "" if record.get(field) is None else str(record[field]) for field in FIELDS}


def _check_filled(
    record: Mapping[str, Any], where: str, called: Mapping[str, str] | None = None
) -> None:
    for field in ("id", "text"):
        if not str(record[field]).strip():
            raise UserError(f"{where}: field {(called or {}).get(field, field)!r} is empty")


def line_of(record: Record) -> bytes:
    """A passage as its line of passages.jsonl."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")


def copy_corpus(folder: Path, records: Iterable[Record], place: Callable[[int], str]) -> str:
    """Write the text, its offsets and the index of ids; returns the hash of the text.

    Raises:
      UserError: two passages have the same id; ``place`` gives the file and line of a row.
    """
    digest, offsets, id_hashes = hashlib.sha256(), array.array("Q", [0]), array.array("Q")
    with (folder / "passages.jsonl").open("wb") as file:
        for record in records:
            line = line_of(record)
            file.write(line)
            digest.update(line)
            offsets.append(offsets[-1] + len(line))
            id_hashes.append(hash_id(record["id"]))
    hashes = np.asarray(id_hashes, np.uint64)
    _check_unique(folder, hashes, offsets, place)
    rows = np.argsort(hashes, kind="stable")
    np.save(folder / "offsets.npy", np.asarray(offsets, np.uint64))
    np.save(folder / "id_hashes.npy", hashes[rows])
    np.save(folder / "id_rows.npy", rows)
    return digest.hexdigest()


def _check_unique(
    folder: Path, hashes: np.ndarray, offsets: Sequence[int], place: Callable[[int], str]
) -> None:
    """Compare the ids of rows with equal hashes."""
    with (folder / "passages.jsonl").open("rb") as file:

        def id_of(row: int) -> str:
            file.seek(offsets[row])
            return str(json.loads(file.readline())["id"])

        for row, first in repeated(hashes, id_of):
            raise UserError(
                f"duplicate passage id {id_of(row)!r}: {place(first)} and {place(row)}; every "
                "passage needs an id of its own"
            )


def token_dtype(vocab_size: int) -> np.dtype:
    """The type in which token ids are stored."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def tokenise(
    folder: Path,
    count: int,
    tower: str,
    config: StoreConfig,
    tokenizer: Tokenizer,
    progress: bool,
) -> dict[str, Any]:
    """Write one tower's token array; returns its entry for the manifest.

    Tells on stderr how many passages were too long.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    length = getattr(config, f"{tower}_length")
    tokens = create_npy(folder / f"{tower}_tokens.npy", (count, length), dtype)
    greatest = cut = 0
    with (
        (folder / "passages.jsonl").open("rb") as file,
        show_progress(f"{tower} tokens", total=count, shown=progress) as bar,
    ):
        for start in range(0, count, _BATCH):
            records = [json.loads(line) for line in itertools.islice(file, _BATCH)]
            rows = token_ids(records, tower, config, tokenizer)
            cut += sum(len(row) > length for row in rows)
            fresh = tokenizer.pad_to(rows, length)
            tokens[start : start + len(records)] = fresh
            greatest = max(greatest, int(fresh.max()))
            bar.update(len(records))
    tokens.flush()
    if cut:
        print(
            f"the {tower} sees the first {length} tokens (StoreConfig.{tower}_length) of {cut:,} "
            f"of {count:,} passages, which are longer",
            file=sys.stderr,
        )
    return {
        "tokenizer": tokenizer.content_hash,
        "format": getattr(config, f"{tower}_format"),
        "length": length,
        "max_id": greatest,
    }


def encode(
    records: Sequence[Record], tower: str, config: StoreConfig, tokenizer: Tokenizer
) -> np.ndarray:
    """Int32 tokens of some passages for one tower."""
    rows = token_ids(records, tower, config, tokenizer)
    return tokenizer.pad_to(rows, getattr(config, f"{tower}_length"))


def token_ids(
    records: Sequence[Record], tower: str, config: StoreConfig, tokenizer: Tokenizer
) -> list[list[int]]:
    """All tokens of some passages for one tower, not cut to a length."""
    texts = [config.text(tower, record) for record in records]
    return tokenizer.encode_batch(texts, add_special=tower == "retriever")


def content_hashes(
    corpus_hash: str, config: StoreConfig, tokenizers: Mapping[str, Tokenizer]
) -> dict[str, str]:
    """The hash of everything, and the hash of all that embeddings depend on."""
    half = {
        tower: [
            corpus_hash,
            tokenizers[tower].content_hash,
            getattr(config, f"{tower}_format"),
            getattr(config, f"{tower}_length"),
        ]
        for tower in PARTS
    }

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps([STORE_FORMAT, value]).encode("utf-8")).hexdigest()

    return {"content_hash": digest(half), "retriever_hash": digest(half["retriever"])}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json, which makes the store complete."""
    text = json.dumps({"format": STORE_FORMAT, **manifest}, indent=2) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")
