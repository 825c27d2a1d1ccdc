"""What the passages of a store are made of: their fields, formats, tokens and hashes."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError
from atlas_jax.core.file_sets import Paths, Place, read_passages
from atlas_jax.core.formats import check_format, fill
from atlas_jax.core.jsonl import STRICT, FieldTypes, RowsConfig, check_fields
from atlas_jax.core.layouts import Layout, PassageFields
from atlas_jax.core.parts import PARTS
from atlas_jax.core.progress import show_progress
from atlas_jax.core.tokenizer import Tokenizer

FIELDS = ("id", "title", "section", "text")
STORE_FORMAT = 2
_REQUIRED: FieldTypes = {"id": (str, int), "text": str}
_OPTIONAL: FieldTypes = {"title": str, "section": str}
LONGEST = 1 << 20  # tokens of a passage, where no model says less
_BATCH = 1024  # passages per call of a tokenizer


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
        """The same settings with `retriever_length` as a number above 0.

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
    path: Paths, progress: bool, rows: RowsConfig = STRICT
) -> Iterator[tuple[Place, PassageFields]]:
    """File, line and checked record of every passage of a file, folder or pattern."""

    def check(file: str, line: int, record: Mapping[str, Any], layout: Layout | None) -> None:
        check_filled(record, f"{file}:{line}", layout.called if layout else None)

    records = read_passages(path, check, rows)
    for place, record in show_progress("read passages", records, shown=progress):
        yield place, strings_of(record)


def normalise(record: Mapping[str, Any], where: str) -> PassageFields:
    """The four fields of a passage as strings; an error begins with ``where``."""
    check_fields(record, _REQUIRED, _OPTIONAL, where)
    check_filled(record, where)
    return strings_of(record)


def strings_of(record: Mapping[str, Any]) -> PassageFields:
    """The four fields of a passage as strings."""
    return {field: "" if record.get(field) is None else str(record[field]) for field in FIELDS}


def check_filled(
    record: Mapping[str, Any], where: str, called: Mapping[str, str] | None = None
) -> None:
    """Refuse a passage whose id or text is empty (UserError).

    Args:
      called: what the file calls our fields, where that differs.
    """
    for field in ("id", "text"):
        if not str(record[field]).strip():
            raise UserError(f"{where}: field {(called or {}).get(field, field)!r} is empty")


def line_of(record: PassageFields) -> bytes:
    """A passage as its line of a store's text."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")


def token_dtype(vocab_size: int) -> np.dtype:
    """The type in which token ids are stored."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def encode(
    records: Sequence[PassageFields], tower: str, config: StoreConfig, tokenizer: Tokenizer
) -> np.ndarray:
    """Int32 tokens of some passages for one tower."""
    rows = token_ids(records, tower, config, tokenizer)
    return tokenizer.pad_to(rows, getattr(config, f"{tower}_length"))


def token_ids(
    records: Sequence[PassageFields], tower: str, config: StoreConfig, tokenizer: Tokenizer
) -> list[list[int]]:
    """Tokens of some passages for one tower: those that are kept, and more of a longer one."""
    texts = [config.text(tower, record) for record in records]
    length: int = getattr(config, f"{tower}_length")
    return tokenizer.encode_starts(texts, tower == "retriever", length)


def content_hashes(
    corpus_hash: str, config: StoreConfig, made_with: Mapping[str, str], form: int = STORE_FORMAT
) -> dict[str, str]:
    """The hash of everything, and the hash of all that embeddings depend on.

    Args:
      corpus_hash: of the lines.
      made_with: the hash of each tower's tokenizer.
      form: of the store.
    """
    half = {
        tower: [
            corpus_hash,
            made_with[tower],
            getattr(config, f"{tower}_format"),
            getattr(config, f"{tower}_length"),
        ]
        for tower in PARTS
    }

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps([form, value]).encode("utf-8")).hexdigest()

    return {"content_hash": digest(half), "retriever_hash": digest(half["retriever"])}
