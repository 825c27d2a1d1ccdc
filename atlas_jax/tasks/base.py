"""Tasks: records from a file, examples from records, scores from predictions.

A task is a frozen dataclass that gin fills with its format strings. The simplest task is `base`: a
query, and the text to write for it.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.formats import check_format, fill
from atlas_jax.core.jsonl import STRICT, FieldTypes, RowsConfig, check_fields, read_jsonl
from atlas_jax.core.layouts import Layout, read_layout
from atlas_jax.core.shortening import Shorten
from atlas_jax.tasks import metrics

# Fields that a line of every task may have.
_SHARED: FieldTypes = {"id": (str, int), "gold": list, "negatives": list, "passages": list}

PassageText = Mapping[str, Any]  # id, title, section, text


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers to choose from: `target_text` is what the reader would write for it."""

    answer: str
    target_text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Hidden:
    """The part `text[start:end]` of a passage that the reader does not see."""

    passage_id: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One query as text.

    Attributes:
      id: of the record.
      query_text: the reader's input before the passage.
      retriever_text: the retriever's input; "" = the reader's query, shortened in the same way.
      target_text: the text that the reader learns to write.
      answers: each of them counts as right.
      gold_ids: passages known to hold the answer.
      negative_ids: passages known not to hold it, to train a retriever against.
      excluded_ids: passages that may not be retrieved.
      given_passages: passages that the file has for this query; None if it has none.
      prompt_text: the beginning of the decoder's output; neither learnt nor scored.
      choices: the answer is the likeliest of these; () = it is generated.
      choice_score: 'likelihood': of the whole target, divided by its length to the power of
        GenerationConfig.length_penalty. 'first_token': only of the first token in which the
        choices differ, as for letters.
      shorten: the parts of a long query that may be cut, in order; () = its beginning.
      hidden: the part of a retrieved passage that is hidden from the reader; None = nothing.
      may_hide: whether examples of this task may have `hidden`; then all batches have its arrays.
      included_id: passage that is always read; "" = none.
      k: passages that are read at most; 0 = as many as the run reads.
      edited: passages of the corpus that this query finds and reads with another text.
      meta: the record's other fields, carried into the predictions file.
    """

    id: str
    query_text: str
    retriever_text: str = ""
    target_text: str = ""
    answers: tuple[str, ...] = ()
    gold_ids: tuple[str, ...] = ()
    negative_ids: tuple[str, ...] = ()
    excluded_ids: tuple[str, ...] = ()
    given_passages: tuple[PassageText, ...] | None = None
    prompt_text: str = ""
    choices: tuple[Choice, ...] = ()
    choice_score: Literal["likelihood", "first_token"] = "likelihood"
    shorten: tuple[Shorten, ...] = ()
    hidden: Hidden | None = None
    may_hide: bool = False
    included_id: str = ""
    k: int = 0
    edited: tuple[PassageText, ...] = ()
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """If the task has no text for the retriever, use the reader's query."""
        object.__setattr__(self, "retriever_text", self.retriever_text or self.query_text)


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """Passages and answer for one example.

    Attributes:
      example: with its answers and gold ids.
      answer: the reader's text; None if nothing was generated.
      passages: the retrieved passages (id, title, text), best first.
      choice_log_probs: of each of the example's choices, normalised over them.
    """

    example: Example
    answer: str | None = None
    passages: Sequence[PassageText] = ()
    choice_log_probs: Sequence[float] = ()


class Task(Protocol):
    """A named way to read a file, ask, and score."""

    name: ClassVar[str]

    def load(
        self, path: str | Path, need_targets: bool = True, rows: RowsConfig = STRICT
    ) -> Sequence[Any]:
        """Check a jsonl file and return its records, in memory or read when they are asked for.

        Args:
          path: the file.
          need_targets: whether a record without answers is an error.
          rows: what happens to a broken line.

        Raises:
          UserError: names file, line and field; or the file has no record.
        """
        ...

    def example(
        self, record: Any, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """Make the record's texts; an equal `rng` gives equal texts.

        Args:
          record: one of those that `load` returned.
          rng: random source for texts that vary between epochs; None = always the same texts.
          step: the training step that the example is for.
        """
        ...

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """Mean scores over the predictions, each between 0 and 1."""
        ...


@runtime_checkable
class AsksSeveralWays(Protocol):
    """A task that asks several examples for each record in evaluation; all have its id."""

    def variants(self, record: Any) -> Sequence[Example]:
        """The examples of a record, at least one."""
        ...


@runtime_checkable
class AsksTyped(Protocol):
    """A task whose question a person can type, without a file."""

    def typed(self, text: str) -> Example:
        """The example of a question as it was typed."""
        ...


@runtime_checkable
class AsksChoices(Protocol):
    """A task whose typed question may come with answers to choose from."""

    def typed_with(self, text: str, choices: Sequence[str]) -> Example:
        """The example of a question and its choices as they were typed."""
        ...


@runtime_checkable
class AddsToRows(Protocol):
    """A task that adds fields of its own to the lines of the predictions file."""

    def row_fields(self, prediction: Prediction) -> Mapping[str, Any]:
        """JSON values by field name."""
        ...


def evaluation_examples(task: Task, records: Sequence[Any]) -> list[Example]:
    """The examples of an evaluation: one for each record, or the record's variants."""
    if isinstance(task, AsksSeveralWays):
        return [example for record in records for example in task.variants(record)]
    return [task.example(record) for record in records]


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A checked line of a file; `fields` are the task's own fields.

    `place` is `file:line`, for errors that are found later.
    """

    id: str
    place: str
    fields: Mapping[str, Any]
    gold_ids: tuple[str, ...]
    passages: tuple[PassageText, ...] | None
    meta: Mapping[str, Any]
    negative_ids: tuple[str, ...] = ()


def typed_record(**fields: Any) -> Record:
    """Make a record from typed values of the task's fields."""
    return Record("1", "the question", fields, (), None, {})


@dataclasses.dataclass(frozen=True)
class BaseTask:
    """Task `base`: lines `{query, target, choices?, id?, passages?, gold?}`, as they are.

    Attributes:
      query_format: the reader's query, of {query}.
      target_format: the reader's target, of {target}. It also formats each of `choices`.
      retriever_format: the retriever's query, of {query}. In this and every task '' means the
        reader's whole query.
      prompt_format: the beginning of the decoder's output, of {query}; needs
        DataConfig.prompt_length.
    """

    query_format: str = "{query}"
    target_format: str = "{target}"
    retriever_format: str = "{query}"
    prompt_format: str = ""

    name: ClassVar[str] = "base"

    def __post_init__(self) -> None:
        """Refuse a format string with other fields.

        Raises:
          UserError: names the binding.
        """
        check_format("BaseTask.query_format", self.query_format, ["query"])
        check_format("BaseTask.target_format", self.target_format, ["target"])
        check_format("BaseTask.retriever_format", self.retriever_format, ["query"])
        check_format("BaseTask.prompt_format", self.prompt_format, ["query"])

    def load(
        self, path: str | Path, need_targets: bool = True, rows: RowsConfig = STRICT
    ) -> list[Record]:
        """See `Task.load`."""
        required: FieldTypes = {"query": str, "target": str} if need_targets else {"query": str}
        optional: FieldTypes = {"target": str, "choices": list}
        return load_records(path, required, optional, list(required), check_choices, rows)

    def example(
        self, record: Record, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """See `Task.example`; nothing varies."""
        query, target = record.fields["query"], record.fields.get("target") or ""
        return Example(
            id=record.id,
            query_text=fill(self.query_format, query=query),
            retriever_text=fill(self.retriever_format, query=query),
            target_text=fill(self.target_format, target=target) if target else "",
            answers=(target,) if target else (),
            gold_ids=record.gold_ids,
            negative_ids=record.negative_ids,
            given_passages=record.passages,
            prompt_text=fill(self.prompt_format, query=query),
            choices=tuple(
                Choice(text, fill(self.target_format, target=text))
                for text in record.fields.get("choices") or ()
            ),
            meta=record.meta,
        )

    def typed(self, text: str) -> Example:
        """See `AsksTyped.typed`."""
        return self.example(typed_record(query=text))

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """See `score_answers` and `score_retrieval`."""
        return score_answers(predictions) | score_retrieval(predictions, recall_at)


def score_answers(predictions: Sequence[Prediction], rouge: bool = False) -> dict[str, float]:
    """`exact_match` and `f1`, means over the rows that have an answer and accepted answers.

    For each row the best of the accepted answers counts. Without such rows the result is empty.
    With `rouge` also `rouge1`, `rouge2` and `rougeL`.
    """
    rows = [(p.answer, p.example.answers) for p in predictions if p.answer is not None]
    rows = [(answer, accepted) for answer, accepted in rows if accepted]
    scores: dict[str, Callable[[str, str], float]] = {
        "exact_match": metrics.exact_match,
        "f1": metrics.f1,
    }
    for name in metrics.ROUGE if rouge else ():
        scores[name] = functools.partial(metrics.rouge, name)
    return {
        name: mean([metrics.best_over_answers(score, *row) for row in rows])
        for name, score in scores.items()
        if rows
    }


def score_retrieval(
    predictions: Sequence[Prediction], recall_at: Sequence[int], in_text: bool = True
) -> dict[str, float]:
    """`recall@k` over the rows with gold ids, `answer_recall@k` over those with answers.

    A row counts 1 if any of the first k passages is gold, or has an accepted answer in its
    title or text (`in_text`). Without retrieved passages, or without such rows, the result
    is empty.
    """
    if not any(p.passages for p in predictions):
        return {}
    with_gold = [p for p in predictions if p.example.gold_ids]
    with_answers = [p for p in predictions if in_text and p.example.answers]
    scores: dict[str, float] = {}
    for k in recall_at:
        if with_gold:
            scores[f"recall@{k}"] = mean([_gold_found(p, k) for p in with_gold])
    for k in recall_at:
        if with_answers:
            scores[f"answer_recall@{k}"] = mean([_answer_found(p, k) for p in with_answers])
    return scores


def load_records(
    path: str | Path,
    required: FieldTypes,
    optional: FieldTypes,
    not_empty: Collection[str],
    check: Callable[[Record], None] | None = None,
    rows: RowsConfig = STRICT,
    layouts: Sequence[Layout] = (),
) -> list[Record]:
    """Read the records of a task's file.

    Args:
      path, required, optional, not_empty, rows, layouts: as in `read_records`.
      check: further checks of the task; raises a UserError that begins with the place.

    Raises:
      UserError: names file, line and field; or two records have the same id; or the file is empty.
    """
    lines: dict[str, int] = {}

    def take(number: int, record: Record) -> None:
        if record.id in lines:
            raise UserError(f"{record.place}: {taken(record.id, lines[record.id])}")
        if check is not None:
            check(record)
        lines[record.id] = number

    read = read_records(path, required, optional, not_empty, take, rows, layouts)
    records = [record for _, record in read]
    if not records:
        raise UserError(f"{path}: there is no record in it")
    return records


def taken(record_id: str, line: int) -> str:
    """The error message about an id that an earlier line has."""
    return f"id {record_id!r} is taken by line {line}"


def read_records(
    path: str | Path,
    required: FieldTypes,
    optional: FieldTypes,
    not_empty: Collection[str],
    check: Callable[[int, Record], None] | None = None,
    rows: RowsConfig = STRICT,
    layouts: Sequence[Layout] = (),
) -> Iterator[tuple[int, Record]]:
    """Yield line and record of a task's file; ids may repeat.

    In every task a line may have `id` (by default the line's number), `gold` and `negatives` (ids)
    and `passages` (objects with `text` and optionally `id`, `title`, `section`).

    Args:
      path: the jsonl file.
      required: types of the task's required fields.
      optional: types of the task's optional fields.
      not_empty: names of text fields that must contain more than blanks.
      check: called with the line and its record; raises a UserError to refuse it.
      rows: what happens to a broken line.
      layouts: other layouts that the file may have; () = only the task's own.

    Raises:
      UserError: names file, line and field.
    """
    made: list[Record] = []

    def take(number: int, raw: dict[str, Any], layout: Layout | None = None) -> None:
        made.clear()
        where = f"{path}:{number}"
        if layout is not None:
            check_fields(raw, required, {**_SHARED, **optional}, where)
        for name in not_empty:
            if not str(raw[name]).strip():
                called = layout.called.get(name, name) if layout else name
                raise UserError(f"{where}: field {called!r} is empty")
        record = record_of(raw, (*required, *optional), where, str(number))
        if check is not None:
            check(number, record)
        made.append(record)

    if layouts:
        read = read_layout(path, layouts, take, rows)
    else:
        read = read_jsonl(path, required, {**_SHARED, **optional}, take, rows)
    for number, _ in read:
        yield number, made[0]


def record_of(raw: Mapping[str, Any], names: Sequence[str], where: str, number: str) -> Record:
    """The record of a line, `names` being the task's own fields; its id is `number` if it has none.

    Raises:
      UserError: a field that every task knows is at fault; begins with `where`.
    """
    own = {name: raw[name] for name in names if name in raw}
    return Record(
        id=str(raw["id"]) if raw.get("id") is not None else number,
        place=where,
        fields=own,
        gold_ids=_ids(raw, "gold", where),
        passages=_given_passages(raw, where),
        meta={name: raw[name] for name in raw if name not in own and name not in _SHARED},
        negative_ids=_ids(raw, "negatives", where),
    )


def _ids(raw: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    """The ids of passages in a field of a record; whole numbers become text."""
    ids = raw.get(name) or ()
    for one in ids:
        if not isinstance(one, str | int) or isinstance(one, bool) or one == "":
            raise UserError(
                f"{where}: field {name!r} holds {one!r}; an id is a text or a whole number"
            )
    return tuple(map(str, ids))


def check_choices(record: Record) -> None:
    """Refuse a field `choices` that is not two or more different texts.

    Raises:
      UserError: names file, line and field.
    """
    choices = record.fields.get("choices")
    if choices is None:
        return
    if not all(isinstance(text, str) and text.strip() for text in choices):
        raise UserError(f"{record.place}: field 'choices' must hold texts that are not empty")
    if len(set(choices)) < max(2, len(choices)):
        raise UserError(f"{record.place}: field 'choices' must hold two or more different texts")


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
        own = passage.get("id")
        passages.append({"id": "" if own is None else str(own), **texts})
    return tuple(passages)


def _gold_found(prediction: Prediction, k: int) -> float:
    ids = [str(passage["id"]) for passage in prediction.passages]
    return metrics.recall_at_k(ids, prediction.example.gold_ids, k)


def _answer_found(prediction: Prediction, k: int) -> float:
    texts = [f"{passage['title']} {passage['text']}" for passage in prediction.passages[:k]]
    return metrics.answer_recall_at_k(texts, prediction.example.answers, k)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of one or more values."""
    return sum(values) / len(values)
