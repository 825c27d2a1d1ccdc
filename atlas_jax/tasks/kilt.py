"""Task `kilt`: the knowledge-intensive tasks in one published format (arXiv 2009.02252).

The predictions file has the form that KILT's own script reads, so it can be submitted as it is. The
scores here are those of this script.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from atlas_jax.core.errors import UserError, one_of, require
from atlas_jax.core.formats import fill
from atlas_jax.core.jsonl import STRICT, FieldTypes, RowsConfig, check_fields
from atlas_jax.tasks import kilt_scores, metrics
from atlas_jax.tasks.base import (
    Example,
    PassageText,
    Prediction,
    Record,
    check_format,
    load_records,
    mean,
    typed_record,
)
from atlas_jax.tasks.fever import FeverTask

_RECALL_AT = 5
_ONE_OF = {
    "answer_choice": ("random", "first"),
    "page": ("id", "title"),
    "fever_answers": ("labels", "words"),
}
# KILT has no claims without enough information.
_FEVER = {label: FeverTask.words[label] for label in ("SUPPORTS", "REFUTES")}
_LABELS = {word: label for label, word in _FEVER.items()}


@dataclasses.dataclass(frozen=True)
class KILTTask:
    """Lines `{id, input, output: [{answer?, provenance?: [{wikipedia_id, ..}]}], meta?}`.

    Attributes:
      query_format: the reader's query; {input} stands for the field.
      target_format: the reader's target; {answer} is one of the answers.
      retriever_format: the retriever's query; {input}. '' = the reader's.
      prompt_format: what the decoder begins with, of {input}; needs DataConfig.prompt_length.
      answer_choice: which of several answers is learnt: 'first', or a random one each time.
      page: how a passage's page is known. 'id': the part of its id before the last ':' is the
        `wikipedia_id` (`atlas-jax prepare kilt_wikipedia` writes such ids). 'title': its title
        is the provenance's `title`.
      fever_answers: the targets for FEVER's answers, SUPPORTS and REFUTES. 'labels': these words.
        'words': 'true' and 'false' as in the task `fever` and in Atlas. The predictions file
        always has labels, as KILT's script needs them.
    """

    query_format: str = "question: {input} answer: <extra_id_0>"
    target_format: str = "<extra_id_0> {answer}"
    retriever_format: str = "{input}"
    prompt_format: str = ""
    answer_choice: Literal["random", "first"] = "random"
    page: Literal["id", "title"] = "id"
    fever_answers: Literal["labels", "words"] = "labels"

    name: ClassVar[str] = "kilt"

    def __post_init__(self) -> None:
        """Refuse a format string with other fields.

        Raises:
          UserError: names the binding.
        """
        for field in ("query_format", "retriever_format", "prompt_format"):
            check_format(f"KILTTask.{field}", getattr(self, field), ["input"])
        check_format("KILTTask.target_format", self.target_format, ["answer"])
        for field, allowed in _ONE_OF.items():
            value = getattr(self, field)
            require(value in allowed, f"KILTTask.{field}", value, one_of(allowed))

    def load(
        self, path: str | Path, need_targets: bool = True, rows: RowsConfig = STRICT
    ) -> list[Record]:
        """See `Task.load`; the published test files have no `output`."""

        def check(record: Record) -> None:
            _check_output(record)
            if need_targets and not _answers(record):
                raise UserError(f"{record.place}: field 'output' gives no answer")

        optional: FieldTypes = {"output": list, "meta": dict}
        return load_records(path, {"input": str}, optional, ["input"], check, rows)

    def example(
        self, record: Record, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """See `Task.example`; what varies is which answer is the target."""
        text, answers, worded = record.fields["input"], _answers(record), self._is_worded(record)
        if worded:
            answers = tuple(_FEVER[answer] for answer in answers)
        at = 0
        if rng is not None and self.answer_choice == "random" and len(answers) > 1:
            at = int(rng.integers(len(answers)))
        return Example(
            id=record.id,
            query_text=fill(self.query_format, input=text),
            retriever_text=fill(self.retriever_format, input=text),
            target_text=fill(self.target_format, answer=answers[at]) if answers else "",
            answers=answers,
            gold_ids=record.gold_ids,
            negative_ids=record.negative_ids,
            given_passages=record.passages,
            prompt_text=fill(self.prompt_format, input=text),
            meta={
                "input": text,
                "gold_output": record.fields.get("output"),
                **({"fever": True} if worded else {}),
                **record.meta,
            },
        )

    def typed(self, text: str) -> Example:
        """See `AsksTyped.typed`."""
        return self.example(typed_record(input=text))

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """The scores of KILT's script; `recall_at` is not used, as it scores recall@5 of pages.

        * `accuracy` (to the letter), `exact_match`, `f1`, `rougeL`: over all rows with answers,
          the best answer counts;
        * `r_precision`, `recall@5`: of pages, over all rows; one without provenance counts 0;
        * `kilt_accuracy`, `kilt_exact_match`, `kilt_f1`, `kilt_rougeL`: as the first four, but 0
          where R-precision is not 1.
        """
        answered = [p for p in predictions if p.answer is not None and p.example.answers]
        searched = any(p.passages for p in predictions) and any(map(self._gold_pages, predictions))
        scores: dict[str, float] = {}
        for name, values in _answer_scores(answered).items():
            scores[name] = mean(values)
            if searched:
                pairs = zip(answered, values, strict=True)
                hits = [value if self._r_precision(p) == 1.0 else 0.0 for p, value in pairs]
                scores[f"kilt_{name}"] = mean(hits)
        if searched:
            scores["r_precision"] = mean([self._r_precision(p) for p in predictions])
            scores[f"recall@{_RECALL_AT}"] = mean([self._recall(p) for p in predictions])
        return scores

    def row_fields(self, prediction: Prediction) -> Mapping[str, Any]:
        """`output` as KILT's script reads it: the answer, and the pages found, each once."""
        seen: dict[str, dict[str, str]] = {}
        for passage in prediction.passages:
            provenance = {"wikipedia_id": _page_id(passage), "title": str(passage["title"])}
            seen.setdefault(self._page_of(passage), provenance)
        output: dict[str, Any] = {"provenance": list(seen.values())}
        if prediction.answer is not None:
            answer = prediction.answer
            if prediction.example.meta.get("fever"):
                answer = _LABELS.get(answer, answer)
            output = {"answer": answer, **output}
        return {"output": [output]}

    def _is_worded(self, record: Record) -> bool:
        """Whether the record is one of FEVER whose labels the reader knows as words.

        A record of a test file has no answers, but stands in a file of FEVER's name.
        """
        answers = set(_answers(record))
        is_fever = answers <= set(_FEVER) if answers else "fever" in Path(record.place).name.lower()
        return self.fever_answers == "words" and is_fever

    def _page_of(self, passage: PassageText) -> str:
        return _page_id(passage) if self.page == "id" else str(passage["title"]).strip()

    def _pages(self, prediction: Prediction) -> list[str]:
        return list(dict.fromkeys(self._page_of(passage) for passage in prediction.passages))

    def _gold_pages(self, prediction: Prediction) -> list[set[str]]:
        """The pages of each output that has a provenance, be it empty; equal sets once."""
        field = "wikipedia_id" if self.page == "id" else "title"
        found: list[set[str]] = []
        for output in prediction.example.meta.get("gold_output") or ():
            if output.get("provenance") is None:
                continue
            pages = {
                str(p[field]).strip() for p in output["provenance"] if p.get(field) is not None
            }
            if pages not in found:
                found.append(pages)
        return found

    def _r_precision(self, prediction: Prediction) -> float:
        """Share of right pages among the first R, for a set of R pages; the best set counts."""
        pages = self._pages(prediction)
        shares = [
            len(gold.intersection(pages[: len(gold)])) / len(gold)
            for gold in self._gold_pages(prediction)
            if gold
        ]
        return max(shares, default=0.0)

    def _recall(self, prediction: Prediction) -> float:
        """Share of the evidence sets complete among the first five ranks.

        A set takes one rank, that of its last page; every other page takes one.
        """
        left = [set(pages) for pages in self._gold_pages(prediction)]
        total, ranks = len(left), list[int | bool]()  # True: complete, a number: a set begun
        for page in self._pages(prediction):
            hit = [number for number, pages in enumerate(left) if page in pages]
            for number in hit:
                ranks = [rank for rank in ranks if rank is True or rank != number + 2]
                left[number].discard(page)
                ranks.append(True if not left[number] else number + 2)
            if not hit:
                ranks.append(False)
        return sum(rank is True for rank in ranks[:_RECALL_AT]) / total if total else 0.0


def _page_id(passage: PassageText) -> str:
    before, colon, _ = str(passage["id"]).rpartition(":")
    return before if colon else str(passage["id"])


def _answers(record: Record) -> tuple[str, ...]:
    outputs = record.fields.get("output") or ()
    texts = [str(output.get("answer") or "").strip() for output in outputs]
    return tuple(dict.fromkeys(text for text in texts if text))


def _check_output(record: Record) -> None:
    for number, output in enumerate(record.fields.get("output") or ()):
        place = f"{record.place}: output[{number}]"
        if not isinstance(output, dict):
            raise UserError(f"{place} must be an object with 'answer' or 'provenance'")
        check_fields(output, {}, {"answer": str, "provenance": list}, place)
        for provenance in output.get("provenance") or ():
            if not isinstance(provenance, dict):
                raise UserError(f"{place}: 'provenance' must hold objects")
            known: FieldTypes = {"wikipedia_id": (str, int), "title": str}
            check_fields(provenance, {}, known, f"{place}: provenance")


def _answer_scores(answered: Sequence[Prediction]) -> dict[str, list[float]]:
    """Name of a score -> the scores of all rows; an empty answer scores 0."""
    functions = {
        "accuracy": kilt_scores.accuracy,
        "exact_match": metrics.exact_match,
        "f1": kilt_scores.f1,
        "rougeL": kilt_scores.rouge_l,
    }
    texts = [(p.answer or "").strip() for p in answered]
    return {
        name: [
            metrics.best_over_answers(score, text, p.example.answers) if text else 0.0
            for p, text in zip(answered, texts, strict=True)
        ]
        for name, score in functions.items()
        if answered
    }
