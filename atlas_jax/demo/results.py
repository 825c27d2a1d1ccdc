"""From predictions files to the figures and samples that the report shows."""

from collections.abc import Mapping, Sequence

from atlas_jax.core.jsonl import JsonObject
from atlas_jax.demo.factbook_splits import stable_random
from atlas_jax.demo.report import EXACT_MATCH, F1, RECALLS, Sample, exact_match_at, f1_at
from atlas_jax.tasks.base import Example, Prediction, score_answers, score_retrieval
from atlas_jax.tasks.metrics import answer_in_passage, best_over_answers, exact_match

_RECALL_AT = tuple(int(name.removeprefix("recall@")) for name in RECALLS)


def scores(predictions: Sequence[JsonObject], k: int = 0) -> dict[str, float]:
    """Return the table's figures in percent, by the tasks' own measures.

    Args:
      predictions: rows of a predictions file; those of retrieval alone have no answers.
      k: passages that the answers were read from.
    """
    scored = [
        Prediction(
            Example(p["id"], "", "", answers=tuple(p["answers"]), gold_ids=tuple(p["gold"])),
            p.get("prediction"),
            p["passages"],
        )
        for p in predictions
    ]
    found = score_answers(scored) | score_retrieval(scored, _RECALL_AT)
    names = {EXACT_MATCH: exact_match_at(k), F1: f1_at(k)}
    kept = (EXACT_MATCH, F1, *RECALLS)
    return {names.get(name, name): 100.0 * found[name] for name in kept if name in found}


def best_read(found: Mapping[str, float], reads: Sequence[int]) -> int:
    """The number of passages with the best exact match; of equal ones the smallest."""
    return max(reads, key=lambda k: (found[exact_match_at(k)], -k))


def samples(
    predictions: Sequence[JsonObject], count: int, read: int, seed: int = 0
) -> list[Sample]:
    """Return some answered questions, drawn by the seed.

    Args:
      predictions: rows of a predictions file.
      count: how many to draw.
      read: passages that the reader saw; more of them may have been found.
    """
    order = sorted(predictions, key=lambda p: p["id"])
    drawn = stable_random("samples", seed).sample(order, min(count, len(order)))
    return [_sample(prediction, read) for prediction in drawn]


def _sample(prediction: JsonObject, read: int) -> Sample:
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
