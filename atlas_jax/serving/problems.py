"""Errors as a client gets them: problem+json, in the words of the commands."""

import http
import math

from starlette.responses import Response

from atlas_jax.core.errors import UserError
from atlas_jax.serving.queue import Closed, DeadlinePassed, QueueFull
from atlas_jax.serving.schemas import Problem

MEDIA_TYPE = "application/problem+json"
CLIENT_LEFT = 499  # nobody gets it; logs and figures tell it apart from a fault
_TITLES = {CLIENT_LEFT: "Client Left"}


class Refused(Exception):
    """A request that is refused with this status, for a reason that the client is told."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.headers = status, headers or {}


def refused(error: BaseException) -> Refused:
    """The answer to any error; nothing is told of one that is a fault of ours."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, UserError):
        return Refused(400, str(error))
    if isinstance(error, QueueFull):
        return Refused(429, str(error), {"retry-after": str(math.ceil(error.retry_after))})
    if isinstance(error, DeadlinePassed):
        return Refused(504, str(error))
    if isinstance(error, Closed):
        return Refused(503, str(error), {"retry-after": "5"})
    return Refused(500, "the server failed; its log tells more under the request id")


def problem_of(error: BaseException, request_id: str) -> tuple[Refused, Problem]:
    """The error, and what the client is told of it."""
    told = refused(error)
    return told, Problem(
        type="about:blank",
        title=_TITLES.get(told.status) or http.HTTPStatus(told.status).phrase,
        status=told.status,
        detail=str(told),
        request_id=request_id,
    )


def problem_response(error: BaseException, request_id: str) -> Response:
    """The error as a response."""
    told, problem = problem_of(error, request_id)
    body = problem.model_dump_json()
    return Response(body, told.status, told.headers, media_type=MEDIA_TYPE)
