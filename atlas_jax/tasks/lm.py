"""Task `lm`: write the rest of a passage, with other passages to help (prefix LM)."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from atlas_jax.core.formats import fill
from atlas_jax.core.jsonl import STRICT, RowsConfig
from atlas_jax.tasks.base import (
    Example,
    Prediction,
    Record,
    check_format,
    score_answers,
    score_retrieval,
)
from atlas_jax.tasks.pretext import check_range, load_passages

_WORD = re.compile(r"\S+")


@dataclasses.dataclass(frozen=True)
class LMTask:
    """Lines `{id, title?, section?, text}`; the text is cut in two between words.

    Attributes:
      query_format: the reader's query, of {text} (the first part), {title} and {section}.
      target_format: the reader's target, of {text} (the rest).
      retriever_format: the retriever's query, as query_format; '' = the reader's.
      min_prefix: smallest share of the words in the first part.
      max_prefix: largest share. The share is drawn evenly; evaluation takes the middle.
      min_words: passages of fewer words are left out.
      filter_self: the passage itself may not be retrieved, since the answer is in it.
      filter_self_after: first training step at which `filter_self` applies; in evaluation it
        always does.
    """

    query_format: str = "{text}<extra_id_0>"
    target_format: str = "<extra_id_0> {text}"
    retriever_format: str = "{text}"
    min_prefix: float = 0.5
    max_prefix: float = 0.5
    min_words: int = 10
    filter_self: bool = True
    filter_self_after: int = 0

    name: ClassVar[str] = "lm"

    def __post_init__(self) -> None:
        """Refuse settings that cannot be.

        Raises:
          UserError: names the binding.
        """
        for field in ("query_format", "retriever_format"):
            check_format(f"LMTask.{field}", getattr(self, field), ["text", "title", "section"])
        check_format("LMTask.target_format", self.target_format, ["text"])
        low, high = self.min_prefix, self.max_prefix
        check_range("LMTask.min_prefix", low, 0 < low < 1, "a number between 0 and 1")
        check_range("LMTask.max_prefix", high, low <= high < 1, f"from {low} to below 1")
        check_range("LMTask.min_words", self.min_words, self.min_words >= 2, "2 or more")

    def load(
        self, path: str | Path, need_targets: bool = True, rows: RowsConfig = STRICT
    ) -> Sequence[Record]:
        """See `Task.load`; passages of fewer than `min_words` words are left out."""
        return load_passages(path, self.min_words, "LMTask.min_words", rows)

    def example(
        self, record: Record, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """See `Task.example`; what varies is where the passage is cut."""
        text: str = record.fields["text"]
        starts = [word.start() for word in _WORD.finditer(text)]
        share = (self.min_prefix + self.max_prefix) / 2
        if rng is not None:
            share = rng.uniform(self.min_prefix, self.max_prefix)
        at = starts[min(max(round(share * len(starts)), 1), len(starts) - 1)]
        first, rest = text[:at].strip(), text[at:].strip()
        fields = {
            "text": first,
            "title": record.fields.get("title") or "",
            "section": record.fields.get("section") or "",
        }
        hidden = self.filter_self and (rng is None or step >= self.filter_self_after)
        return Example(
            id=record.id,
            query_text=fill(self.query_format, **fields),
            retriever_text=fill(self.retriever_format, **fields),
            target_text=fill(self.target_format, text=rest),
            answers=(rest,),
            excluded_ids=(record.id,) if hidden else (),
            given_passages=record.passages,
            meta={"title": record.fields.get("title") or "", **record.meta},
        )

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """Exact match, F1, ROUGE-1, -2 and -L of the rest; recall as in `tasks.base`."""
        return score_answers(predictions, rouge=True) | score_retrieval(predictions, recall_at)
