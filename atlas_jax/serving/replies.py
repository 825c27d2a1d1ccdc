"""Turns answers into what a client gets."""

import math
from collections.abc import Mapping

from starlette.responses import Response

from atlas_jax.answering.results import Passage
from atlas_jax.index.inspection import recent_versions
from atlas_jax.index.living import LivingStore
from atlas_jax.serving.schemas import (
    AnswerReply,
    FoundReply,
    PassageReply,
    Told,
    VersionReply,
    VersionsReply,
)
from atlas_jax.serving.service import Done

_VERSIONS = 100  # told at once


def json_response(value: Told, status: int = 200) -> Response:
    """A value as JSON, which nobody on the way may keep."""
    headers = {"cache-control": "no-store"}
    return Response(value.model_dump_json(), status, headers, media_type="application/json")


def answer_reply(done: Done) -> AnswerReply:
    """An answer with its passages."""
    answer = done.answer
    return AnswerReply(
        question=answer.question,
        answer=answer.text,
        log_probability=_finite(answer.log_probability),
        passages=[passage_reply(one) for one in answer.passages],
        timings=done.timings,
        index=done.index,
    )


def found_reply(done: Done) -> FoundReply:
    """The passages of a question."""
    passages = [passage_reply(one) for one in done.answer.passages]
    return FoundReply(
        question=done.answer.question, passages=passages, timings=done.timings, index=done.index
    )


def passage_reply(passage: Passage) -> PassageReply:
    """A passage; numbers that JSON cannot hold are left out."""
    return PassageReply(
        id=passage.id,
        title=passage.title,
        section=passage.section,
        text=passage.text,
        score=_finite(passage.score),
        attention=_finite(passage.attention),
        alone=_finite(passage.alone),
        left_out=_finite(passage.left_out),
    )


def stored_reply(passage: Mapping[str, str]) -> PassageReply:
    """A passage as the corpus has it."""
    names = ("id", "title", "section", "text")
    return PassageReply(**{name: passage[name] for name in names})  # type: ignore[arg-type]


def versions_reply(store: LivingStore, before: int, earlier: bool) -> VersionsReply:
    """The newest versions of a store below a number, newest first.

    Args:
      before: 0 = from the newest.
      earlier: whether the server was told to search others than the newest.
    """
    found, oldest = recent_versions(store.directory, before, _VERSIONS)
    versions = [
        VersionReply(
            version=one["version"],
            time=one["time"] or None,
            passages=one["count"],
            **one["change"],
        )
        for one in found
    ]
    serving = store.version["version"]
    return VersionsReply(versions=versions, serving=serving, oldest=oldest, earlier=earlier)


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
