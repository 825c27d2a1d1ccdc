"""Declared tasks: the fields that are asked, the field of the label, a word for each label.

A task of labels is a subclass of `LabelledTask` that says which fields of a line the query is made
of, which field holds the label, and the word that is written for each label. See `boolq.py`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from atlas_jax.core.errors import UserError, require
from atlas_jax.core.formats import check_format, fill
from atlas_jax.core.jsonl import STRICT, FieldTypes, RowsConfig
from atlas_jax.tasks import metrics
from atlas_jax.tasks.base import (
    Choice,
    Example,
    Prediction,
    Record,
    load_records,
    mean,
    score_retrieval,
    typed_record,
)
from atlas_jax.tasks.templates import Prompt

_ONE_OF = {"answer_by": ("generation", "likelihood"), "compare": ("normalised", "literal")}


@dataclasses.dataclass(frozen=True)
class LabelledTask:
    """Base of the tasks whose answer is one of a few labels, for each of which a word is written.

    A subclass sets `name`, `asks`, `label` and `words`, and defaults of the formats.

    Attributes:
      query_format: the reader's query, of the fields that are asked.
      target_format: the reader's target; {answer} is the label's word.
      retriever_format: the retriever's query, of the same fields. '' = the reader's.
      prompt_format: what the decoder begins with, of the same fields; needs
        DataConfig.prompt_length.
      answer_by: 'generation' (what is none of the words is wrong) or 'likelihood' of the words.
      compare: what is written counts when it is the word but for case, punctuation, articles
        and blanks ('normalised'), or to the letter ('literal').
    """

    query_format: str = ""
    target_format: str = "<extra_id_0> {answer}"
    retriever_format: str = ""
    prompt_format: str = ""
    answer_by: Literal["generation", "likelihood"] = "generation"
    compare: Literal["normalised", "literal"] = "normalised"

    name: ClassVar[str]
    asks: ClassVar[tuple[str, ...]]  # text fields of a line, the first of which a person types
    label: ClassVar[str]  # the field of a line that holds the label
    words: ClassVar[Mapping[str | bool, str]]  # label -> what the reader writes for it
    choice_score: ClassVar[Literal["likelihood", "first_token"]] = "likelihood"

    @property
    def spoken(self) -> Mapping[Any, str]:
        """Label -> what the reader writes for it, as this task is bound."""
        return self.words

    def query(self, asked: Mapping[str, str]) -> Prompt:
        """The reader's query for a line's fields."""
        return Prompt(fill(self.query_format, **asked), ())

    def retriever_query(self, asked: Mapping[str, str]) -> str:
        """The retriever's query; "" = the reader's."""
        return fill(self.retriever_format, **asked)

    def check_query(self) -> None:
        """Refuse a wrong `query_format`."""
        own = type(self).__name__
        check_format(f"{own}.query_format", self.query_format, list(self.asks))

    def __post_init__(self) -> None:
        """Refuse a format string with other fields, or a choice that there is not.

        Raises:
          UserError: names the binding.
        """
        own = type(self).__name__
        self.check_query()
        for field in ("retriever_format", "prompt_format"):
            check_format(f"{own}.{field}", getattr(self, field), list(self.asks))
        check_format(f"{own}.target_format", self.target_format, ["answer"])
        for field, allowed in _ONE_OF.items():
            value = getattr(self, field)
            require(value in allowed, f"{own}.{field}", value, " or ".join(map(repr, allowed)))

    def load(
        self, path: str | Path, need_targets: bool = True, rows: RowsConfig = STRICT
    ) -> list[Record]:
        """See `Task.load`; without `need_targets` a line may come without its label."""

        def check(record: Record) -> None:
            label = record.fields.get(self.label)
            if label not in self.words and (label is not None or need_targets):
                raise UserError(
                    f"{record.place}: field {self.label!r} is {label!r}, expected one of "
                    f"{', '.join(map(repr, self.words))}"
                )

        required: FieldTypes = dict.fromkeys(self.asks, str)
        optional: FieldTypes = {self.label: type(next(iter(self.words)))}
        return load_records(path, required, optional, self.asks, check, rows)

    def example(
        self, record: Record, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """See `Task.example`; nothing varies."""
        asked = {name: record.fields[name] for name in self.asks}
        label = record.fields.get(self.label)
        known = {} if label is None else {self.label: label}
        word = self.spoken[label] if label is not None else ""
        words = self.spoken.values()
        choices = [Choice(one, fill(self.target_format, answer=one)) for one in words]
        query = self.query(asked)
        return Example(
            id=record.id,
            query_text=query.text,
            retriever_text=self.retriever_query(asked),
            target_text=fill(self.target_format, answer=word) if word else "",
            answers=(word,) if word else (),
            gold_ids=record.gold_ids,
            negative_ids=record.negative_ids,
            given_passages=record.passages,
            prompt_text=fill(self.prompt_format, **asked),
            choices=tuple(choices) if self.answer_by == "likelihood" else (),
            choice_score=self.choice_score,
            shorten=query.cuts,
            meta={**asked, **known, **record.meta},
        )

    def typed(self, text: str) -> Example:
        """See `AsksTyped.typed`; fields beyond the first stay empty."""
        return self.example(typed_record(**{**dict.fromkeys(self.asks, ""), self.asks[0]: text}))

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """`accuracy` over all lines and over those of each label, and `recall@k`.

        Whether a label's word stands in a passage says nothing, so there is no answer_recall.
        """
        rows = [p for p in predictions if p.answer is not None and p.example.answers]
        scores = {}
        if rows:
            scores["accuracy"] = mean([self._is_right(p) for p in rows])
        for label, word in self.spoken.items():
            of_label = [self._is_right(p) for p in rows if p.example.answers == (word,)]
            if of_label:
                scores[f"accuracy_{str(label).lower().replace(' ', '_')}"] = mean(of_label)
        return scores | score_retrieval(predictions, recall_at, in_text=False)

    def row_fields(self, prediction: Prediction) -> Mapping[str, Any]:
        """`predicted_label`; null for what is no label's word."""
        if prediction.answer is None:
            return {}
        written = self._compared(prediction.answer)
        labels = {self._compared(word): label for label, word in self.spoken.items()}
        return {"predicted_label": labels.get(written)}

    def _compared(self, text: str) -> str:
        return metrics.normalize_answer(text) if self.compare == "normalised" else text

    def _is_right(self, prediction: Prediction) -> float:
        written = self._compared(prediction.answer or "")
        return float(written == self._compared(prediction.example.answers[0]))
