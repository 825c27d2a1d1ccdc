"""Task `temporal`: questions whose answer depends on the edition of the corpus.

One file has the answers of two editions. An evaluation searches an index of one edition. Its scores
tell which edition's answers the model gave: whether its knowledge changed with the index.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.formats import Filled, fill, literal
from atlas_jax.core.jsonl import STRICT, FieldTypes, RowsConfig
from atlas_jax.tasks import metrics
from atlas_jax.tasks.base import (
    Example,
    Prediction,
    Record,
    check_format,
    load_records,
    mean,
    score_retrieval,
    typed_record,
)
from atlas_jax.tasks.qa import check_answers


@dataclasses.dataclass(frozen=True)
class TemporalTask:
    """Lines `{question, answers_<edition>, gold_<edition>?, changed, id?}`, for two editions.

    The first `<extra_id_0>` in a question is the blank to be filled, as in TempLAMA.

    Attributes:
      edition: of the index that is searched; its answers are learnt and count as right.
      other: the other edition.
      query_format: the reader's query; {question} stands for the field.
      target_format: the reader's target; {answer} is the edition's first answer.
      retriever_format: the retriever's query; {question}. '' = the reader's.
      prompt_format: what the decoder begins with, of {question}; needs DataConfig.prompt_length.
    """

    edition: str = ""
    other: str = ""
    query_format: str = "question: {question} answer: <extra_id_0>"
    target_format: str = "<extra_id_0> {answer}"
    retriever_format: str = "{question}"
    prompt_format: str = ""

    name: ClassVar[str] = "temporal"

    def __post_init__(self) -> None:
        """Refuse missing or equal editions and format strings with other fields.

        Raises:
          UserError: names the binding.
        """
        object.__setattr__(self, "edition", str(self.edition))  # gin reads 2026 as a number
        object.__setattr__(self, "other", str(self.other))
        for name in ("edition", "other"):
            if not getattr(self, name):
                raise UserError(f"TemporalTask.{name} is not given: bind it to an edition's name")
        if self.edition == self.other:
            raise UserError(
                f"TemporalTask.other = {self.other!r} is TemporalTask.edition, too; name the "
                "edition to tell it from"
            )
        for field in ("query_format", "retriever_format", "prompt_format"):
            check_format(f"TemporalTask.{field}", getattr(self, field), ["question"])
        check_format("TemporalTask.target_format", self.target_format, ["answer"])

    def load(
        self, path: str | Path, need_targets: bool = True, rows: RowsConfig = STRICT
    ) -> list[Record]:
        """See `Task.load`; both editions' answers are always needed."""

        def check(record: Record) -> None:
            for edition in (self.edition, self.other):
                own = {"answers": record.fields[f"answers_{edition}"]}
                check_answers(dataclasses.replace(record, fields=own), needed=True)

        required: FieldTypes = {
            "question": str,
            f"answers_{self.edition}": list,
            f"answers_{self.other}": list,
            "changed": bool,
        }
        optional: FieldTypes = {f"gold_{self.edition}": list, f"gold_{self.other}": list}
        return load_records(path, required, optional, ["question"], check, rows)

    def example(
        self, record: Record, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """See `Task.example`; nothing varies."""
        question = record.fields["question"]
        asked = _with_blank(question)
        answers = {
            edition: tuple(record.fields.get(f"answers_{edition}") or ())
            for edition in (self.edition, self.other)
        }
        right = answers[self.edition]
        return Example(
            id=record.id,
            query_text=fill(self.query_format, question=asked),
            retriever_text=fill(self.retriever_format, question=asked),
            target_text=fill(self.target_format, answer=right[0]) if right else "",
            answers=right,
            gold_ids=tuple(map(str, record.fields.get(f"gold_{self.edition}") or ())),
            negative_ids=record.negative_ids,
            given_passages=record.passages,
            prompt_text=fill(self.prompt_format, question=asked),
            meta={
                "question": question,
                "edition": self.edition,
                "changed": record.fields.get("changed", False),
                f"answers_{self.other}": list(answers[self.other]),
                **record.meta,
            },
        )

    def typed(self, text: str) -> Example:
        """See `AsksTyped.typed`."""
        return self.example(typed_record(question=text))

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """Exact matches with each edition's answers, for changed and for unchanged facts.

        * `exact_match`: with the index's edition, over all rows; * `changed_followed`,
        `changed_stayed`: changed facts answered as in the index's edition, and
          as in the other one;
        * `unchanged_right`: unchanged facts answered as in either edition;
        * `recall@k` of the edition's gold passages.
        """
        rows = [p for p in predictions if p.answer is not None]
        changed = [self._followed(p) for p in rows if p.example.meta["changed"]]
        unchanged = [self._followed(p) for p in rows if not p.example.meta["changed"]]
        scores = {}
        if rows:
            right = [self._followed(p) in (self.edition, "both") for p in rows]
            scores["exact_match"] = mean([float(one) for one in right])
        if changed:
            scores["changed_followed"] = mean(
                [float(one in (self.edition, "both")) for one in changed]
            )
            scores["changed_stayed"] = mean([float(one == self.other) for one in changed])
        if unchanged:
            scores["unchanged_right"] = mean([float(one != "neither") for one in unchanged])
        return scores | score_retrieval(predictions, recall_at)

    def row_fields(self, prediction: Prediction) -> Mapping[str, Any]:
        """`followed`: the edition whose answer was given, 'both' or 'neither'."""
        return {} if prediction.answer is None else {"followed": self._followed(prediction)}

    def _followed(self, prediction: Prediction) -> str:
        example = prediction.example
        matches = {
            edition: metrics.best_over_answers(
                metrics.exact_match, prediction.answer or "", answers
            )
            for edition, answers in (
                (self.edition, example.answers),
                (self.other, example.meta[f"answers_{self.other}"]),
            )
        }
        given = [edition for edition, hit in matches.items() if hit]
        return "both" if len(given) == 2 else given[0] if given else "neither"


def _with_blank(question: str) -> Filled:
    """The question as text, but for its blank."""
    return Filled("<extra_id_0>".join(map(literal, question.split("<extra_id_0>", 1))))
