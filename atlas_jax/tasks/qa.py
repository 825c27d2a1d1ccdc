"""Task `qa`: a question with short answers, each of which counts as right."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.formats import fill
from atlas_jax.core.jsonl import STRICT, FieldTypes, RowsConfig
from atlas_jax.core.layouts import QUESTIONS
from atlas_jax.tasks.base import (
    Choice,
    Example,
    Prediction,
    Record,
    check_choices,
    check_format,
    load_records,
    score_answers,
    score_retrieval,
    typed_record,
)


@dataclasses.dataclass(frozen=True)
class QATask:
    """Lines `{question, answers, target?, choices?, id?, gold?, negatives?, passages?}`.

    Attributes:
      query_format: the reader's query; {question} stands for the field.
      target_format: the reader's target; {answer} is `target`, or else one of `answers`.
      retriever_format: the retriever's query; {question}. '' = the reader's.
      answer_choice: which of several answers is learnt: 'first', or another one each time
        ('random', as in Atlas). Evaluation always takes the first.
      prompt_format: what the decoder begins with, of {question}; needs
        DataConfig.prompt_length.
    """

    query_format: str = "question: {question} answer: <extra_id_0>"
    target_format: str = "<extra_id_0> {answer}"
    retriever_format: str = "{question}"
    answer_choice: Literal["random", "first"] = "random"
    prompt_format: str = ""

    name: ClassVar[str] = "qa"

    def __post_init__(self) -> None:
        """Refuse a format string with other fields.

        Raises:
          UserError: names the binding.
        """
        check_format("QATask.query_format", self.query_format, ["question"])
        check_format("QATask.target_format", self.target_format, ["answer"])
        check_format("QATask.retriever_format", self.retriever_format, ["question"])
        check_format("QATask.prompt_format", self.prompt_format, ["question"])
        if self.answer_choice not in ("random", "first"):
            raise UserError(
                f"QATask.answer_choice = {self.answer_choice!r}: expected 'random' or 'first'"
            )

    def load(
        self, path: str | Path, need_targets: bool = True, rows: RowsConfig = STRICT
    ) -> list[Record]:
        """See `Task.load`; without `need_targets` a question may come without answers."""

        def check(record: Record) -> None:
            check_answers(record, need_targets)
            check_choices(record)

        optional: FieldTypes = {"answers": list, "target": str, "choices": list}
        return load_records(path, {"question": str}, optional, ["question"], check, rows, QUESTIONS)

    def example(
        self, record: Record, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """See `Task.example`; what varies is which answer is the target."""
        question = record.fields["question"]
        answers = tuple(record.fields.get("answers") or ())
        target = record.fields.get("target") or ""
        if not target and answers:
            several = self.answer_choice == "random" and rng is not None and len(answers) > 1
            target = answers[int(rng.integers(len(answers))) if several and rng else 0]
        return Example(
            id=record.id,
            query_text=fill(self.query_format, question=question),
            retriever_text=fill(self.retriever_format, question=question),
            target_text=fill(self.target_format, answer=target) if target else "",
            answers=answers or ((target,) if target else ()),
            gold_ids=record.gold_ids,
            negative_ids=record.negative_ids,
            given_passages=record.passages,
            prompt_text=fill(self.prompt_format, question=question),
            choices=tuple(
                Choice(text, fill(self.target_format, answer=text))
                for text in record.fields.get("choices") or ()
            ),
            meta={"question": question, **record.meta},
        )

    def typed(self, text: str) -> Example:
        """See `AsksTyped.typed`."""
        return self.example(typed_record(question=text))

    def typed_with(self, text: str, choices: Sequence[str]) -> Example:
        """See `AsksChoices.typed_with`."""
        return self.example(typed_record(question=text, choices=choices))

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """Exact match, F1, recall@k and answer_recall@k; see `tasks.base`."""
        return score_answers(predictions) | score_retrieval(predictions, recall_at)


def check_answers(record: Record, needed: bool) -> None:
    """Refuse answers that are not texts, and a record without answers if they are needed.

    Raises:
      UserError: names file, line and field.
    """
    answers, target = record.fields.get("answers"), record.fields.get("target")
    for answer in answers or ():
        if not isinstance(answer, str) or not answer.strip():
            raise UserError(
                f"{record.place}: field 'answers' must hold texts that are not empty, "
                f"but has {answer!r}"
            )
    if needed and not answers and not (target or "").strip():
        raise UserError(f"{record.place}: fields 'answers' and 'target' give no answer")
