"""Task `ranking`: scores a retriever's ranking of a corpus by graded judgements (BEIR)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.formats import fill
from atlas_jax.core.jsonl import STRICT, FieldTypes, RowsConfig
from atlas_jax.tasks import metrics
from atlas_jax.tasks.base import (
    Example,
    Prediction,
    Record,
    check_format,
    load_records,
    mean,
)

_NDCG_AT = 10


@dataclasses.dataclass(frozen=True)
class RankingTask:
    """Lines `{question, qrels: {passage id: grade}, id?}`, see `atlas-jax prepare beir`.

    It can also train a retriever: a passage of the highest grade is the positive.

    Attributes:
      query_format: the retriever's query; {question} stands for the field.
    """

    query_format: str = "{question}"

    name: ClassVar[str] = "ranking"

    def __post_init__(self) -> None:
        """Refuse a format string with other fields.

        Raises:
          UserError: names the binding.
        """
        check_format("RankingTask.query_format", self.query_format, ["question"])

    def load(
        self, path: str | Path, need_targets: bool = True, rows: RowsConfig = STRICT
    ) -> list[Record]:
        """See `Task.load`; every query has a relevant passage."""
        required: FieldTypes = {"question": str, "qrels": dict}
        return load_records(path, required, {}, ["question"], _check_grades, rows)

    def example(
        self, record: Record, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """See `Task.example`; nothing varies."""
        query = fill(self.query_format, question=record.fields["question"])
        grades: dict[str, float] = record.fields["qrels"]
        best = max(grades.values())
        return Example(
            id=record.id,
            query_text=query,
            retriever_text=query,
            gold_ids=tuple(found for found, grade in grades.items() if grade == best),
            negative_ids=record.negative_ids,
            # If queries are themselves passages, a query does not count as its own result (as in
            # BEIR).
            excluded_ids=(record.id,),
            meta={"question": record.fields["question"], "qrels": grades, **record.meta},
        )

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """`ndcg@10`, and `recall@k` as the share of relevant passages that were found.

        As BEIR reports them (trec_eval's ndcg_cut and recall), means over the queries.
        """
        rows = [
            ([str(passage["id"]) for passage in p.passages], p.example.meta["qrels"])
            for p in predictions
        ]
        scores = {f"ndcg@{_NDCG_AT}": mean([metrics.ndcg_at_k(*row, _NDCG_AT) for row in rows])}
        for k in recall_at:
            scores[f"recall@{k}"] = mean([metrics.share_found_at_k(*row, k) for row in rows])
        return scores


def _check_grades(record: Record) -> None:
    grades = record.fields["qrels"]
    if not all(
        isinstance(grade, int | float) and not isinstance(grade, bool) for grade in grades.values()
    ):
        raise UserError(f"{record.place}: field 'qrels' must hold a number for each passage id")
    if not any(grade > 0 for grade in grades.values()):
        raise UserError(f"{record.place}: field 'qrels' has no grade above 0")
