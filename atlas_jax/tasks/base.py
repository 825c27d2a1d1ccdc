"""What a task is: records from a file, examples from records, scores from predictions.

A task is a frozen dataclass that gin fills with its format strings. `base` itself is the
plainest one: a query, and the text to write for it.
"""

import dataclasses
import string
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import gin
import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import FieldTypes, check_fields, read_jsonl
from atlas_jax.tasks import metrics

PassageText = Mapping[str, Any]  # id, title, section, text


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One query as text.

    Attributes:
      id: of the record.
      query_text: what the reader gets before the passage.
      retriever_text: what the retriever gets.
      target_text: what the reader learns to write.
      answers: any of them counts as right.
      gold_ids: passages known to hold the answer.
      excluded_ids: passages that may not be retrieved.
      given_passages: passages that the file has for this query; None if it has none.
      meta: the record's other fields, carried into the predictions file.
    """

    id: str
    query_text: str
    retriever_text: str
    target_text: str = ""
    answers: tuple[str, ...] = ()
    gold_ids: tuple[str, ...] = ()
    excluded_ids: tuple[str, ...] = ()
    given_passages: tuple[PassageText, ...] | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """What was found and written for one example.

    Attributes:
      example: with its answers and gold ids.
      answer: the reader's text; None if nothing was generated.
      passages: the retrieved passages (id, title, text), best first.
    """

    example: Example
    answer: str | None = None
    passages: Sequence[PassageText] = ()


class Task(Protocol):
    """A named way to read a file, ask, and score."""

    name: ClassVar[str]

    def load(self, path: str | Path, need_targets: bool = True) -> list[Any]:
        """Check a jsonl file and return its records.

        Raises:
          UserError: naming file, line and field; or there is no record at all.
        """
        ...

    def example(
        self, record: Any, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """Make the record's text; equal `rng` gives equal text.

        Args:
          record: one of those that `load` returned.
          rng: source of what varies from epoch to epoch; None = always the same.
          step: the training step that the example is for.
        """
        ...

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """Mean scores over the predictions, each between 0 and 1."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A checked line of a file; `fields` are those that the task itself asks for.

    `place` is `file:line`, for errors that show later.
    """

    id: str
    place: str
    fields: Mapping[str, Any]
    gold_ids: tuple[str, ...]
    passages: tuple[PassageText, ...] | None
    meta: Mapping[str, Any]


@gin.configurable
@dataclasses.dataclass(frozen=True)
class BaseTask:
    """Task `base`: lines `{query, target, id?, passages?, gold?}`, written as they are.

    Attributes:
      query_format: the reader's query; {query} stands for the field.
      target_format: the reader's target; {target}.
      retriever_format: the retriever's query; {query}.
    """

    query_format: str = "{query}"
    target_format: str = "{target}"
    retriever_format: str = "{query}"

    name: ClassVar[str] = "base"

    def __post_init__(self) -> None:
        """Refuse a format string with other fields.

        Raises:
          UserError: names the binding.
        """
        check_format("BaseTask.query_format", self.query_format, ["query"])
        check_format("BaseTask.target_format", self.target_format, ["target"])
        check_format("BaseTask.retriever_format", self.retriever_format, ["query"])

    def load(self, path: str | Path, need_targets: bool = True) -> list[Record]:
        """See `Task.load`."""
        required: FieldTypes = {"query": str, "target": str} if need_targets else {"query": str}
        return load_records(path, required, {"target": str}, not_empty=list(required))

    def example(
        self, record: Record, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """See `Task.example`; nothing varies."""
        query, target = record.fields["query"], record.fields.get("target") or ""
        return Example(
            id=record.id,
            query_text=self.query_format.format(query=query),
            retriever_text=self.retriever_format.format(query=query),
            target_text=self.target_format.format(target=target) if target else "",
            answers=(target,) if target else (),
            gold_ids=record.gold_ids,
            given_passages=record.passages,
            meta=record.meta,
        )

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """See `score_answers` and `score_retrieval`."""
        return score_answers(predictions) | score_retrieval(predictions, recall_at)


def score_answers(predictions: Sequence[Prediction]) -> dict[str, float]:
    """`exact_match` and `f1`, means over the rows that have an answer and accepted answers.

    The best of the accepted answers counts. Without any such row the result is empty.
    """
    rows = [(p.answer, p.example.answers) for p in predictions if p.answer is not None]
    rows = [(answer, accepted) for answer, accepted in rows if accepted]
    scores = {"exact_match": metrics.exact_match, "f1": metrics.f1}
    return {
        name: _mean([metrics.best_over_answers(score, *row) for row in rows])
        for name, score in scores.items()
        if rows
    }


def score_retrieval(
    predictions: Sequence[Prediction], recall_at: Sequence[int]
) -> dict[str, float]:
    """`recall@k` over the rows with gold ids, `answer_recall@k` over those with answers.

    A row counts 1 if any of the first k passages is gold, or has an accepted answer in its
    title or text. Without retrieved passages, or without such rows, the result is empty.
    """
    if not any(p.passages for p in predictions):
        return {}
    with_gold = [p for p in predictions if p.example.gold_ids]
    with_answers = [p for p in predictions if p.example.answers]
    scores: dict[str, float] = {}
    for k in recall_at:
        if with_gold:
            scores[f"recall@{k}"] = _mean([_gold_found(p, k) for p in with_gold])
    for k in recall_at:
        if with_answers:
            scores[f"answer_recall@{k}"] = _mean([_answer_found(p, k) for p in with_answers])
    return scores


def load_records(
    path: str | Path,
    required: FieldTypes,
    optional: FieldTypes,
    not_empty: Collection[str],
) -> list[Record]:
    """Read the records of a task's file.

    Every task's lines may have `id` (else the line's number serves), `gold` (ids) and
    `passages` (objects with `text` and perhaps `id`, `title`, `section`).

    Args:
      path: the jsonl file.
      required: types of the task's fields that must be there.
      optional: types of those that may.
      not_empty: names of text fields that must hold more than blanks.

    Raises:
      UserError: naming file, line and field; two records have one id; the file is empty.
    """
    shared: FieldTypes = {"id": (str, int), "gold": list, "passages": list}
    records: list[Record] = []
    lines: dict[str, int] = {}
    for number, raw in read_jsonl(path, required, {**shared, **optional}):
        where = f"{path}:{number}"
        for name in not_empty:
            if not str(raw[name]).strip():
                raise UserError(f"{where}: field {name!r} is empty")
        own = {name: raw[name] for name in (*required, *optional) if name in raw}
        record = Record(
            id=str(raw["id"]) if raw.get("id") is not None else str(number),
            place=where,
            fields=own,
            gold_ids=tuple(map(str, raw.get("gold") or ())),
            passages=_given_passages(raw, where),
            meta={name: raw[name] for name in raw if name not in own and name not in shared},
        )
        if record.id in lines:
            raise UserError(f"{where}: id {record.id!r} is taken by line {lines[record.id]}")
        lines[record.id] = number
        records.append(record)
    if not records:
        raise UserError(f"{path}: there is no record in it")
    return records


def check_format(binding: str, template: str, fields: Sequence[str]) -> None:
    """Refuse a format string that is malformed or has other than the given fields.

    Raises:
      UserError: names the gin binding and the fields there are.
    """
    known = ", ".join(f"{{{field}}}" for field in fields)
    try:
        used = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"{binding} = {template!r}: {error}; fields are {known}") from None
    for name in used:
        if name not in fields:
            raise UserError(f"{binding} = {template!r}: no field {{{name}}}; there is {known}")


def _given_passages(raw: Mapping[str, Any], where: str) -> tuple[PassageText, ...] | None:
    if raw.get("passages") is None:
        return None
    passages = []
    for number, passage in enumerate(raw["passages"]):
        place = f"{where}: passages[{number}]"
        if not isinstance(passage, dict):
            raise UserError(f"{place} must be an object with 'text' and perhaps 'title'")
        check_fields(
            passage, {"text": str}, {"id": (str, int), "title": str, "section": str}, place
        )
        texts = {name: str(passage.get(name) or "") for name in ("title", "section", "text")}
        passages.append({"id": str(passage.get("id", "")), **texts})
    return tuple(passages)


def _gold_found(prediction: Prediction, k: int) -> float:
    ids = [str(passage["id"]) for passage in prediction.passages]
    return metrics.recall_at_k(ids, prediction.example.gold_ids, k)


def _answer_found(prediction: Prediction, k: int) -> float:
    texts = [f"{passage['title']} {passage['text']}" for passage in prediction.passages[:k]]
    return metrics.answer_recall_at_k(texts, prediction.example.answers, k)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
