"""Task `mlm`: write the masked spans of a passage; they can be looked up in other passages.

This is the pretext task of Atlas's pretraining (T5's span corruption). A variant masks the parts
that a question would ask for: values, numbers, dates and names.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from atlas_jax.core.formats import Filled, fill, literal
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
from atlas_jax.tasks.spans import KINDS, layout, random_spans, salient_spans

_FIELDS = ("text", "title", "section")


@dataclasses.dataclass(frozen=True)
class MLMTask:
    """Lines `{id, title?, section?, text}`; the target is `<extra_id_0> span <extra_id_1> span`.

    Lengths are in words, so no tokenizer is needed. T5 counts tokens: one to two for each word.

    Attributes:
      masking: 'random' (T5's span corruption) or 'salient' (see `spans.layout`; a passage
        without a salient span is masked at random).
      noise_density: share of the query's words that is masked.
      mean_span_words: mean length of a random span.
      max_spans: no more spans than this; at most the reader's number of sentinels.
      max_span_words: longer values and names are not masked as salient spans.
      span_kinds: which salient spans: any of 'value', 'number', 'entity'.
      max_query_words: the query is a crop of this many words around the masked spans; 0 = the
        whole passage.
      min_words: passages of fewer words are left out.
      query_format: the reader's query, of {text} (with sentinels), {title}, {section}.
      retriever_format: the retriever's query; its {text} has the spans left out. '' = the
        reader's, with the sentinels in it.
      filter_self: the passage itself may not be retrieved, since the answer is in it.
      filter_self_after: first training step at which `filter_self` applies.
    """

    masking: Literal["random", "salient"] = "random"
    noise_density: float = 0.15
    mean_span_words: float = 3.0
    max_spans: int = 20
    max_span_words: int = 10
    span_kinds: tuple[str, ...] = KINDS
    max_query_words: int = 0
    min_words: int = 10
    query_format: str = "{text}"
    retriever_format: str = "{text}"
    filter_self: bool = True
    filter_self_after: int = 0

    name: ClassVar[str] = "mlm"

    def __post_init__(self) -> None:
        """Refuse settings that cannot be.

        Raises:
          UserError: names the binding.
        """
        check_format("MLMTask.query_format", self.query_format, _FIELDS)
        check_format("MLMTask.retriever_format", self.retriever_format, _FIELDS)
        for name, fits, expected in (
            ("masking", self.masking in ("random", "salient"), "'random' or 'salient'"),
            ("noise_density", 0 < self.noise_density < 1, "a number between 0 and 1"),
            ("mean_span_words", self.mean_span_words >= 1, "1 or more"),
            ("max_spans", self.max_spans >= 1, "1 or more"),
            ("max_span_words", self.max_span_words >= 1, "1 or more"),
            ("max_query_words", self.max_query_words == 0 or self.max_query_words >= 2,
             "0 (the whole passage), or 2 or more"),
            ("min_words", self.min_words >= 2, "2 or more"),
            ("span_kinds", self.span_kinds and set(self.span_kinds) <= set(KINDS),
             f"some of {', '.join(KINDS)}"),
        ):  # fmt: skip
            check_range(f"MLMTask.{name}", getattr(self, name), bool(fits), expected)

    def load(
        self, path: str | Path, need_targets: bool = True, rows: RowsConfig = STRICT
    ) -> Sequence[Record]:
        """See `Task.load`; passages of fewer than `min_words` words are left out."""
        return load_passages(path, self.min_words, "MLMTask.min_words", rows)

    def example(
        self, record: Record, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """See `Task.example`; what varies is what is masked."""
        if rng is None:
            rng = np.random.default_rng(zlib.crc32(record.id.encode("utf-8")))
        text: str = record.fields["text"]
        spans, (left, right) = self._mask(text, rng)
        query, bare, target = [], [], []
        for number, (start, end) in enumerate(spans):
            query.append(f"{literal(text[left:start])}<extra_id_{number}>")
            bare.append(text[left:start])
            target.append(f"<extra_id_{number}> {literal(text[start:end])}")
            left = end
        query.append(literal(text[left:right]))
        bare.append(text[left:right])
        rest = {name: record.fields.get(name) or "" for name in ("title", "section")}
        hidden = self.filter_self and step >= self.filter_self_after
        return Example(
            id=record.id,
            query_text=fill(self.query_format, text=Filled("".join(query)), **rest),
            retriever_text=fill(self.retriever_format, text="".join(bare), **rest),
            target_text=" ".join(target),
            answers=(" ".join(text[start:end] for start, end in spans),),
            excluded_ids=(record.id,) if hidden else (),
            given_passages=record.passages,
            meta={"title": rest["title"], **record.meta},
        )

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """Exact match and F1 of the spans joined by blanks; recall as in `tasks.base`."""
        return score_answers(predictions) | score_retrieval(predictions, recall_at)

    def _mask(
        self, text: str, rng: np.random.Generator
    ) -> tuple[list[tuple[int, int]], tuple[int, int]]:
        """Character ranges to mask, and the range of the text that becomes the query."""
        kinds = self.span_kinds if self.masking == "salient" else ()
        found = layout(text, kinds, self.max_span_words)
        if found.salient:
            chosen, (first, last) = salient_spans(
                found, self.noise_density, self.max_spans, self.max_query_words, rng
            )
            spans = [(span.start, span.end) for span in chosen]
        else:
            total = len(found.word_starts)
            length = min(self.max_query_words or total, total)
            first = int(rng.integers(total - length + 1))
            last = first + length
            drawn = random_spans(
                length, self.noise_density, self.mean_span_words, self.max_spans, rng
            )
            spans = [
                (found.word_starts[first + a], found.word_ends[first + b - 1]) for a, b in drawn
            ]
        return spans, (found.word_starts[first], found.word_ends[last - 1])
