"""Task `fever`: do the passages support or refute a claim (arXiv 1803.05355)?"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.formats import fill
from atlas_jax.core.jsonl import STRICT, FieldTypes, RowsConfig
from atlas_jax.tasks import metrics
from atlas_jax.tasks.base import (
    Choice,
    Example,
    Prediction,
    Record,
    check_format,
    load_records,
    mean,
    score_retrieval,
    typed_record,
)

# The word that the reader writes for each label, as in Atlas.
WORDS = {"SUPPORTS": "true", "REFUTES": "false", "NOT ENOUGH INFO": "maybe"}
_ONE_OF = {
    "answer_by": ("generation", "likelihood"),
    "compare": ("normalised", "literal"),
}


@dataclasses.dataclass(frozen=True)
class FeverTask:
    """Lines `{claim, label, id?, gold?, negatives?, passages?}`; labels are those of `WORDS`.

    Attributes:
      query_format: the reader's query, of {claim}.
      target_format: the reader's target; {answer} is 'true', 'false' or 'maybe'.
      retriever_format: the retriever's query, of {claim}. '' = the reader's.
      prompt_format: the beginning of the decoder's output, of {claim}; needs
        DataConfig.prompt_length.
      answer_by: 'generation' (as in Atlas; any other text than the three words is wrong), or
        'likelihood' of the three words.
      compare: when a generated text counts as a word. 'normalised': case, punctuation, articles
        and blanks do not matter. 'literal': every character must be equal, as in Atlas.
    """

    query_format: str = "question: {claim} answer: <extra_id_0>"
    target_format: str = "<extra_id_0> {answer}"
    retriever_format: str = "{claim}"
    prompt_format: str = ""
    answer_by: Literal["generation", "likelihood"] = "generation"
    compare: Literal["normalised", "literal"] = "normalised"

    name: ClassVar[str] = "fever"

    def __post_init__(self) -> None:
        """Refuse a format string with other fields.

        Raises:
          UserError: names the binding.
        """
        for field in ("query_format", "retriever_format", "prompt_format"):
            check_format(f"FeverTask.{field}", getattr(self, field), ["claim"])
        check_format("FeverTask.target_format", self.target_format, ["answer"])
        for field, allowed in _ONE_OF.items():
            if getattr(self, field) not in allowed:
                raise UserError(
                    f"FeverTask.{field} = {getattr(self, field)!r}: expected "
                    f"{' or '.join(map(repr, allowed))}"
                )

    def load(
        self, path: str | Path, need_targets: bool = True, rows: RowsConfig = STRICT
    ) -> list[Record]:
        """See `Task.load`; without `need_targets` a claim may come without its label."""

        def check(record: Record) -> None:
            label = record.fields.get("label")
            if label not in WORDS and (label is not None or need_targets):
                raise UserError(
                    f"{record.place}: field 'label' is {label!r}, expected one of "
                    f"{', '.join(map(repr, WORDS))}"
                )

        optional: FieldTypes = {"label": str}
        return load_records(path, {"claim": str}, optional, ["claim"], check, rows)

    def example(
        self, record: Record, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """See `Task.example`; nothing varies."""
        claim, label = record.fields["claim"], record.fields.get("label")
        choices = tuple(
            Choice(word, fill(self.target_format, answer=word)) for word in WORDS.values()
        )
        return Example(
            id=record.id,
            query_text=fill(self.query_format, claim=claim),
            retriever_text=fill(self.retriever_format, claim=claim),
            target_text=fill(self.target_format, answer=WORDS[label]) if label else "",
            answers=(WORDS[label],) if label else (),
            gold_ids=record.gold_ids,
            negative_ids=record.negative_ids,
            given_passages=record.passages,
            prompt_text=fill(self.prompt_format, claim=claim),
            choices=choices if self.answer_by == "likelihood" else (),
            meta={"claim": claim, **({"label": label} if label else {}), **record.meta},
        )

    def typed(self, text: str) -> Example:
        """See `AsksTyped.typed`."""
        return self.example(typed_record(claim=text))

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """`accuracy` over all claims and over those of each label, and `recall@k`.

        There is no answer_recall: that a passage contains the word 'true' says nothing.
        """
        rows = [p for p in predictions if p.answer is not None and p.example.answers]
        scores = {}
        if rows:
            scores["accuracy"] = mean([self._is_right(p) for p in rows])
        for label, word in WORDS.items():
            of_label = [self._is_right(p) for p in rows if p.example.answers == (word,)]
            if of_label:
                scores[f"accuracy_{label.lower().replace(' ', '_')}"] = mean(of_label)
        return scores | score_retrieval(predictions, recall_at, in_text=False)

    def row_fields(self, prediction: Prediction) -> Mapping[str, Any]:
        """`predicted_label`, as FEVER's own script wants it; null for another word."""
        if prediction.answer is None:
            return {}
        written = self._compared(prediction.answer)
        labels = {word: label for label, word in WORDS.items()}
        return {"predicted_label": labels.get(written)}

    def _compared(self, text: str) -> str:
        return metrics.normalize_answer(text) if self.compare == "normalised" else text

    def _is_right(self, prediction: Prediction) -> float:
        written = self._compared(prediction.answer or "")
        return float(written == self._compared(prediction.example.answers[0]))
