"""From predictions files to the figures and samples that the report shows."""

from collections.abc import Sequence
from typing import Any

from atlas_jax.demo.factbook_splits import stable_random
from atlas_jax.demo.report import METRICS, RECALLS, Sample
from atlas_jax.tasks.base import Example, Prediction, score_answers, score_retrieval
from atlas_jax.tasks.metrics import answer_in_passage, best_over_answers, exact_match

Record = dict[str, Any]

_RECALL_AT = tuple(int(name.removeprefix("recall@")) for name in RECALLS)


def scores(predictions: Sequence[Record]) -> dict[str, float]:
    """Return the table's figures in percent, by the tasks' own measures."""
    scored = [
        Prediction(
            Example(p["id"], "", "", answers=tuple(p["answers"]), gold_ids=tuple(p["gold"])),
            p.get("prediction"),
            p["passages"],
        )
        for p in predictions
    ]
    found = score_answers(scored) | score_retrieval(scored, _RECALL_AT)
    return {name: 100.0 * found[name] for name in METRICS if name in found}


def samples(predictions: Sequence[Record], count: int, read: int) -> list[Sample]:
    """Return some answered questions, drawn at random but always the same ones.

    Args:
      predictions: rows of a predictions file.
      count: how many to draw.
      read: passages that the reader saw; more of them may have been found.
    """
    order = sorted(predictions, key=lambda p: p["id"])
    drawn = stable_random("samples").sample(order, min(count, len(order)))
    return [_sample(prediction, read) for prediction in drawn]


def _sample(prediction: Record, read: int) -> Sample:
    """The source is the best-ranked passage with the answer in it, else the first one."""
    answer, passages = prediction["prediction"], prediction["passages"][:read]
    holding = [p for p in passages if answer and answer_in_passage(p["text"], [answer])]
    source = (holding or passages)[0]
    return Sample(
        question=prediction["question"],
        answer=answer,
        accepted=prediction["answers"],
        correct=best_over_answers(exact_match, answer, prediction["answers"]) == 1.0,
        title=source["title"],
        section=source["section"],
        passage=source["text"],
        score=source["score"],
        rank=passages.index(source) + 1,
    )
