"""Answers as they come: waiting for one, and server-sent events."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from atlas_jax.answering.results import Passage
from atlas_jax.serving.logs import failed
from atlas_jax.serving.problems import Refused, problem_of
from atlas_jax.serving.queue import DeadlinePassed, Ticket
from atlas_jax.serving.replies import answer_reply, passage_reply
from atlas_jax.serving.schemas import AnswerEvent, FoundEvent, StatusReply, TokensEvent, Told
from atlas_jax.serving.service import Done, Service


async def answer_to(service: Service, ticket: Ticket) -> Done:
    """Wait for the answer to a question, until its deadline.

    Raises:
      Refused: it was not there in time.
    """
    try:
        async with asyncio.timeout(ticket.deadline - time.monotonic()):
            done: Done = await asyncio.wrap_future(ticket.answered)
            return done
    except (TimeoutError, DeadlinePassed):
        service.metrics.late.inc()
        seconds = service.config.deadline_seconds
        message = f"no answer within {seconds:g} s (ServeConfig.deadline_seconds)"
        raise Refused(504, message) from None


class Events:
    """The events of one request: each question's passages, its answer as it grows, then whole.

    The last event is `done`.

    Attributes:
      ended: questions whose answer, or whose fault, was told.
    """

    def __init__(self, service: Service, request_id: str) -> None:
        self._service, self._request_id = service, request_id
        self.ended = 0
        self._told: dict[int, str] = {}  # each answer so far
        self._events = asyncio.Queue[tuple[str, Told]]()

    def found(self, number: int, question: str, passages: Sequence[Passage]) -> None:
        """Tell the passages of a question; to be called in the event loop."""
        replies = [passage_reply(one) for one in passages]
        event = FoundEvent(index=number, question=question, passages=replies)
        self._events.put_nowait(("passages", event))

    def wrote(self, number: int, text: str) -> None:
        """Tell the answer so far, if it has grown; to be called in the event loop."""
        if text != self._told.get(number, ""):
            self._told[number] = text
            self._events.put_nowait(("tokens", TokensEvent(index=number, text=text)))

    async def of(self, tickets: Sequence[Ticket]) -> AsyncIterator[bytes]:
        """The events of these questions."""
        waiting = [asyncio.create_task(self._answered(n, one)) for n, one in enumerate(tickets)]
        try:
            while self.ended < len(tickets):
                name, value = await self._events.get()
                self.ended += name not in ("passages", "tokens")
                yield _encoded(name, value)
            yield _encoded("done", StatusReply(status="done"))
        finally:
            for task in waiting:
                task.cancel()

    async def _answered(self, number: int, ticket: Ticket) -> None:
        try:
            reply = answer_reply(await answer_to(self._service, ticket))
            event = AnswerEvent(index=number, answer=reply, served_by=reply.index)
            self._events.put_nowait(("answer", event))
        except Exception as error:
            refusal, problem = problem_of(error, self._request_id)
            if refusal.status == 500:
                failed(self._request_id, error)
            self._events.put_nowait(("error", problem))


class EventsResponse(StreamingResponse):
    """Sends the events of a request; if the client leaves, its questions give up their places.

    It may have left before the first event is asked for, so `Events.of` cannot see to that.
    """

    def __init__(self, service: Service, events: Events, tickets: Sequence[Ticket]) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events.of(tickets), media_type="text/event-stream", headers=headers)
        self._service, self._told, self._tickets = service, events, tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `starlette.responses.Response`."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.metrics.left.inc(len(self._tickets) - self._told.ended)
            self._service.queue.withdraw(self._tickets)


def _encoded(name: str, value: Told) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), value.model_dump_json().encode())
