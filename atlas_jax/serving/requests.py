"""Reads what a client sends: bounded in time, bytes and every field."""

import asyncio
from collections.abc import Sequence
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from atlas_jax.answering.asked import Asked
from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.serving.config import ServeConfig
from atlas_jax.serving.faults import validated
from atlas_jax.serving.problems import Refused
from atlas_jax.serving.schemas import AnswersRequest, PassagesRequest, RetrieveRequest

T = TypeVar("T", AnswersRequest, RetrieveRequest, PassagesRequest)


async def read_request(request: Request, kind: type[T], config: ServeConfig) -> T:
    """The body of a request.

    Raises:
      Refused: it is too large, too slow, or not JSON by its own account.
      UserError: it is not what `kind` describes; the field is named.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise Refused(415, "the body must be JSON: send content-type: application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "the body must not be compressed")
    try:
        async with asyncio.timeout(config.body_seconds):
            raw = await _body(request, config.max_body)
    except TimeoutError:
        message = f"the body did not arrive within {config.body_seconds:g} s"
        raise Refused(408, message, {"connection": "close"}) from None
    except ClientDisconnect:
        raise Refused(400, "the client left before its body was complete") from None
    return validated(strict_json.parse(raw, "the body"), kind, "the body")


async def _body(request: Request, most: int) -> bytes:
    too_large = Refused(
        413,
        f"the body has more than {most:,} bytes (ServeConfig.max_body)",
        {"connection": "close"},
    )
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and (len(stated) > 18 or int(stated) > most):
        raise too_large
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > most:
            raise too_large
    return bytes(raw)


def asked_of(sent: AnswersRequest | RetrieveRequest, config: ServeConfig) -> list[Asked]:
    """The questions of a request.

    Raises:
      UserError: there are none or too many, or a text is too long.
    """
    questions = [sent.questions] if isinstance(sent.questions, str) else sent.questions
    if not questions:
        raise UserError("questions is empty; give one question or more")
    if len(questions) > config.max_questions:
        raise UserError(
            f"{len(questions)} questions: this server takes up to {config.max_questions} at once "
            "(ServeConfig.max_questions)"
        )
    choices = sent.choices if isinstance(sent, AnswersRequest) else []
    for name, texts in (
        ("questions", questions),
        ("exclude", sent.exclude),
        ("replace", list(sent.replace)),
        ("choices", choices),
        ("as_of", [str(sent.as_of)]),
    ):
        _check_lengths(name, texts, config.max_characters, "max_characters")
    _check_lengths("replace", list(sent.replace.values()), config.max_text, "max_text")
    return [Asked(one, sent.k, sent.exclude, sent.replace, choices) for one in questions]


def changes_of(sent: PassagesRequest, config: ServeConfig) -> list[dict[str, str]]:
    """The passages of a request, as the corpus has them.

    Raises:
      UserError: a text is too long.
    """
    for name in ("id", "title", "section", "text"):
        most = "max_text" if name == "text" else "max_characters"
        texts = [getattr(one, name) for one in sent.passages]
        _check_lengths(f"passages: {name}", texts, getattr(config, most), most)
    _check_lengths("delete", sent.delete, config.max_characters, "max_characters")
    return [one.model_dump() for one in sent.passages]


def _check_lengths(name: str, texts: Sequence[str], most: int, binding: str) -> None:
    longest = max(map(len, texts), default=0)
    if longest > most:
        raise UserError(
            f"{name}: a text has {longest:,} characters, more than {most:,} (ServeConfig.{binding})"
        )
