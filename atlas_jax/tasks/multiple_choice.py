"""Task `multiple_choice`: which of the options answers the question (MMLU)?

The reader is asked for the letter. It prefers some letters whatever option they stand for. Asking
with the options in several orders and taking the mean removes this bias (de-biasing).
"""

import dataclasses
import itertools
import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.formats import Filled, fill, literal
from atlas_jax.core.jsonl import STRICT, FieldTypes, RowsConfig
from atlas_jax.core.shortening import Shorten
from atlas_jax.tasks.base import (
    Choice,
    Example,
    Prediction,
    Record,
    check_format,
    load_records,
    mean,
    score_retrieval,
)

LETTERS = string.ascii_uppercase
Orders = Literal["single", "cyclic", "all"]
_ORDERS = ("single", "cyclic", "all")
_MOST_FOR_ALL = 5  # 120 orders


@dataclasses.dataclass(frozen=True)
class MultipleChoiceTask:
    """Lines `{question, options: {A: .., B: ..}, answer, id?, gold?, passages?}`.

    From 2 to 26 options under the first letters of the alphabet; `answer` is a letter.

    Attributes:
      query_format: the reader's query, of {question} and {options}.
      option_format: one of the options, of {letter} and {option}; joined by blanks.
      target_format: the reader's target, of {letter}.
      retriever_format: the retriever's query, of {question} and {options}. These are the options
        in the order of the file, without letters, so that every order finds the same passages.
        '' = the reader's query; then each order may find other passages.
      prompt_format: the beginning of the decoder's output, of {question} and {options} as they
        are asked; the letter after it is scored. Needs DataConfig.prompt_length.
      max_question_tokens: number of a question's last reader tokens that are kept; the options
        stay whole.
      train_orders: order of the options, drawn anew each time. 'single': that of the file.
        'cyclic': a rotation of it. 'all': any order.
      eval_orders: the same values, but each of these orders is asked, and the mean of an option's
        probabilities counts. 'all' allows up to five options.
    """

    query_format: str = "question: {question} options: {options} answer: <extra_id_0>"
    option_format: str = "({letter}) {option}"
    target_format: str = "<extra_id_0> {letter}"
    retriever_format: str = "{question} {options}"
    prompt_format: str = ""
    max_question_tokens: int = 356
    train_orders: Orders = "single"
    eval_orders: Orders = "single"

    name: ClassVar[str] = "multiple_choice"

    def __post_init__(self) -> None:
        """Refuse format strings with other fields, and other orders.

        Raises:
          UserError: names the binding.
        """
        name = "MultipleChoiceTask"
        both = ["question", "options"]
        for field in ("query_format", "retriever_format", "prompt_format"):
            check_format(f"{name}.{field}", getattr(self, field), both)
        check_format(f"{name}.option_format", self.option_format, ["letter", "option"])
        check_format(f"{name}.target_format", self.target_format, ["letter"])
        if self.query_format.count("{question}") != 1:
            raise UserError(
                f"{name}.query_format = {self.query_format!r}: needs {{question}} just once"
            )
        for field in ("train_orders", "eval_orders"):
            if getattr(self, field) not in _ORDERS:
                raise UserError(
                    f"{name}.{field} = {getattr(self, field)!r}: expected one of "
                    f"{', '.join(map(repr, _ORDERS))}"
                )
        if self.max_question_tokens < 1:
            raise UserError(
                f"{name}.max_question_tokens = {self.max_question_tokens}: expected 1 or more"
            )

    def load(
        self, path: str | Path, need_targets: bool = True, rows: RowsConfig = STRICT
    ) -> list[Record]:
        """See `Task.load`; without `need_targets` a question may come without its answer."""

        def check(record: Record) -> None:
            _check_options(record, need_targets)
            options = record.fields["options"]
            if not need_targets and self.eval_orders == "all" and len(options) > _MOST_FOR_ALL:
                raise UserError(
                    f"{record.place}: MultipleChoiceTask.eval_orders = 'all' would ask "
                    f"{len(options)} options in every order; use 'cyclic' for more than "
                    f"{_MOST_FOR_ALL}"
                )

        required: FieldTypes = {"question": str, "options": dict}
        return load_records(path, required, {"answer": str}, ["question"], check, rows)

    def example(
        self, record: Record, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """See `Task.example`; what varies is the order of the options (`train_orders`)."""
        order = np.arange(len(record.fields["options"]))
        if rng is not None and self.train_orders == "cyclic":
            order = np.roll(order, -int(rng.integers(len(order))))
        elif rng is not None and self.train_orders == "all":
            order = rng.permutation(len(order))
        return self._in_order(record, order.tolist())

    def variants(self, record: Record) -> list[Example]:
        """The record in each of `eval_orders`, that of the file first."""
        places = range(len(record.fields["options"]))
        orders: list[Sequence[int]] = [list(places)]
        if self.eval_orders == "cyclic":
            orders = [[*places[start:], *places[:start]] for start in places]
        elif self.eval_orders == "all":
            orders = list(itertools.permutations(places))
        return [self._in_order(record, order) for order in orders]

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """`accuracy` in the file's order, `debiased_accuracy` over all orders, `recall@k`."""
        by_record: dict[str, list[Prediction]] = defaultdict(list)
        for prediction in predictions:
            by_record[prediction.example.id].append(prediction)
        firsts = [asked[0] for asked in by_record.values()]
        scored = [
            asked
            for asked in by_record.values()
            if asked[0].choice_log_probs and asked[0].example.answers
        ]
        scores = {}
        if scored:
            scores = {
                "accuracy": mean([float(_picks_right(asked[:1])) for asked in scored]),
                "debiased_accuracy": mean([float(_picks_right(asked)) for asked in scored]),
            }
        return scores | score_retrieval(firsts, recall_at)

    def row_fields(self, prediction: Prediction) -> Mapping[str, Any]:
        """`predicted_letter`, as the file has it, and not as it was asked."""
        if not prediction.choice_log_probs:
            return {}
        at = int(np.argmax(prediction.choice_log_probs))
        return {"predicted_letter": prediction.example.meta["order"][at]}

    def _in_order(self, record: Record, order: Sequence[int]) -> Example:
        question = record.fields["question"].strip()
        texts = list(record.fields["options"].values())
        right = record.fields.get("answer")
        asked = literal(question)
        options = Filled(
            " ".join(
                fill(self.option_format, letter=LETTERS[place], option=texts[source])
                for place, source in enumerate(order)
            )
        )
        before = fill(self.query_format.partition("{question}")[0], options=options)
        target = ""
        if right is not None:
            letter = LETTERS[list(order).index(LETTERS.index(right))]
            target = fill(self.target_format, letter=letter)
        return Example(
            id=record.id,
            query_text=fill(self.query_format, question=asked, options=options),
            retriever_text=fill(self.retriever_format, question=asked, options=" ".join(texts)),
            target_text=target,
            answers=(record.fields["options"][right],) if right is not None else (),
            gold_ids=record.gold_ids,
            negative_ids=record.negative_ids,
            given_passages=record.passages,
            prompt_text=fill(self.prompt_format, question=asked, options=options),
            choices=tuple(
                Choice(texts[source], fill(self.target_format, letter=LETTERS[place]))
                for place, source in enumerate(order)
            ),
            choice_score="first_token",
            shorten=(Shorten(len(before), len(before) + len(asked), self.max_question_tokens),),
            meta={
                "question": question,
                "options": record.fields["options"],
                "answer": right,
                "order": "".join(LETTERS[source] for source in order),
                **record.meta,
            },
        )


def _check_options(record: Record, needs_answer: bool) -> None:
    options, answer = record.fields["options"], record.fields.get("answer")
    letters = LETTERS[: len(options)]
    if not 2 <= len(options) <= len(LETTERS) or "".join(options) != letters:
        raise UserError(
            f"{record.place}: field 'options' has the letters {', '.join(options) or '(none)'}; "
            "expected 2 to 26 of them in order, from A on"
        )
    for letter, text in options.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{record.place}: option {letter} must be a text that is not empty")
    if (answer is not None or needs_answer) and answer not in options:
        raise UserError(
            f"{record.place}: field 'answer' is {answer!r}, expected one of {', '.join(letters)}"
        )


def _picks_right(asked: Sequence[Prediction]) -> bool:
    """Whether the option text with the highest mean probability is the right one."""
    sums: dict[str, float] = defaultdict(float)  # by option text, which two letters may share
    texts: dict[str, str] = {}
    for prediction in asked:
        example = prediction.example
        for letter, choice, log_prob in zip(
            example.meta["order"], example.choices, prediction.choice_log_probs, strict=True
        ):
            sums[letter] += float(np.exp(log_prob))
            texts[letter] = choice.answer
    return texts[max(sums, key=lambda letter: sums[letter])] == asked[0].example.answers[0]
