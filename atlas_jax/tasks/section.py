"""Task `section`: write a passage from its title and section, with other passages to help."""

import array
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.formats import fill
from atlas_jax.core.jsonl import STRICT, RowsConfig
from atlas_jax.core.unique import hash_id
from atlas_jax.tasks.base import (
    Example,
    Prediction,
    Record,
    check_format,
    score_answers,
    score_retrieval,
)
from atlas_jax.tasks.file_records import FileRecords
from atlas_jax.tasks.pretext import check_range, load_passages

_FILTERS = ("none", "passage", "section")


@dataclasses.dataclass(frozen=True)
class SectionTask:
    """Lines `{id, title?, section, text}`; passages without a section are left out.

    Attributes:
      query_format: the reader's query, of {title} and {section}.
      target_format: the reader's target, of {text}.
      retriever_format: the retriever's query, as query_format; '' = the reader's.
      min_words: passages of fewer words are left out.
      filter: passages that may not be retrieved: the 'passage' itself, all passages of its
        'section' (up to DataConfig.max_excluded), or 'none'.
      filter_after: first training step at which `filter` applies; in evaluation it always does.
    """

    query_format: str = "{title}, {section}"
    target_format: str = "{text}"
    retriever_format: str = "{title}, {section}"
    min_words: int = 10
    filter: Literal["none", "passage", "section"] = "passage"
    filter_after: int = 0

    name: ClassVar[str] = "section"

    def __post_init__(self) -> None:
        """Refuse settings that cannot be.

        Raises:
          UserError: names the binding.
        """
        for field in ("query_format", "retriever_format"):
            check_format(f"SectionTask.{field}", getattr(self, field), ["title", "section"])
        check_format("SectionTask.target_format", self.target_format, ["text"])
        check_range("SectionTask.min_words", self.min_words, self.min_words >= 1, "1 or more")
        if self.filter not in _FILTERS:
            raise UserError(
                f"SectionTask.filter = {self.filter!r}: expected one of "
                f"{', '.join(map(repr, _FILTERS))}"
            )

    def load(
        self, path: str | Path, need_targets: bool = True, rows: RowsConfig = STRICT
    ) -> Sequence[Record]:
        """See `Task.load`; a record knows the other passages of its section."""
        records = _InSections(load_passages(path, self.min_words, "SectionTask.min_words", rows))
        if not records:
            raise UserError(f"{path}: no passage has a field 'section' that is not empty")
        return records

    def example(
        self, record: Record, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """See `Task.example`; nothing varies."""
        fields = {name: record.fields.get(name) or "" for name in ("title", "section")}
        text = record.fields["text"]
        excluded = {
            "none": (),
            "passage": (record.id,),
            "section": tuple(record.fields["same_section"]),
        }[self.filter]
        return Example(
            id=record.id,
            query_text=fill(self.query_format, **fields),
            retriever_text=fill(self.retriever_format, **fields),
            target_text=fill(self.target_format, text=text),
            answers=(text,),
            excluded_ids=excluded if rng is None or step >= self.filter_after else (),
            given_passages=record.passages,
            meta={**fields, **record.meta},
        )

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """Exact match, F1, ROUGE-1, -2 and -L of the text; recall as in `tasks.base`."""
        return score_answers(predictions, rouge=True) | score_retrieval(predictions, recall_at)


class _InSections(Sequence[Record]):
    """The records that have a section; each is told the ids of its section's passages.

    Of each record a hash of its title and section is kept, and its place among equal ones: 24
    bytes.
    """

    def __init__(self, records: FileRecords) -> None:
        self._records = records
        hashes, rows = array.array("Q"), array.array("q")
        for row, record in enumerate(records):
            if _place(record)[1]:
                hashes.append(_hash(record))
                rows.append(row)
        hashes_n = np.asarray(hashes, np.uint64)
        order_n = np.argsort(hashes_n, kind="stable")
        self._rows_n = np.asarray(rows, np.int64)
        self._hashes_n, self._alike_n = hashes_n[order_n], self._rows_n[order_n]

    def __len__(self) -> int:
        return len(self._rows_n)

    def __getitem__(self, row: Any) -> Any:
        """The record of a row, with `same_section`; of a slice a list of them."""
        if isinstance(row, slice):
            return [self[one] for one in range(len(self))[row]]
        record = self._records[int(self._rows_n[row])]
        hashed = np.uint64(_hash(record))
        first, last = (np.searchsorted(self._hashes_n, hashed, side) for side in ("left", "right"))
        alike = (self._records[one] for one in self._alike_n[first:last].tolist())
        same = [one.id for one in alike if _place(one) == _place(record)]
        return dataclasses.replace(record, fields={**record.fields, "same_section": same})


def _hash(record: Record) -> int:
    return hash_id("\n".join(_place(record)))


def _place(record: Record) -> tuple[str, str]:
    return record.fields.get("title") or "", (record.fields.get("section") or "").strip()
