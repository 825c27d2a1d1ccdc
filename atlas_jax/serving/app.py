"""The routes of the server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from atlas_jax.answering.results import Passage
from atlas_jax.index.living import LivingStore
from atlas_jax.serving import metrics
from atlas_jax.serving.config import ServeConfig
from atlas_jax.serving.events import Events, EventsResponse, answer_to
from atlas_jax.serving.examples import Examples
from atlas_jax.serving.guard import Guard, allowed_names
from atlas_jax.serving.openapi import description
from atlas_jax.serving.problems import CLIENT_LEFT, Refused, problem_response
from atlas_jax.serving.queue import Ticket
from atlas_jax.serving.replies import (
    answer_reply,
    found_reply,
    json_response,
    stored_reply,
    versions_reply,
)
from atlas_jax.serving.requests import asked_of, changes_of, read_request
from atlas_jax.serving.schemas import (
    AnswersReply,
    AnswersRequest,
    ChangedReply,
    ExamplesReply,
    ModelReply,
    ModelsReply,
    PassageReply,
    PassagesRequest,
    RetrieveReply,
    RetrieveRequest,
    StatusReply,
)
from atlas_jax.serving.service import Done, Service

T = TypeVar("T")

_STATIC = str(files("atlas_jax.serving") / "static")
_DIGITS = 18  # of a version's number, at most
_PATIENT = 8  # changes of passages, and requests for earlier versions, that wait at a time
_PUBLIC = ("/", "/healthz", "/readyz", "/openapi.json")


def make_app(
    service: Service, key: str, name: str, is_full: Callable[[], bool] = lambda: False
) -> ASGIApp:
    """The application of a service.

    Args:
      key: the API key; "" = none is needed.
      name: what the model is called.
      is_full: whether there are more connections than the server takes.
    """
    routes = _Routes(service, name, bool(key))
    app = Starlette(
        routes=[
            Route("/", routes.explorer),
            Route("/healthz", routes.healthz),
            Route("/readyz", routes.readyz),
            Route("/metrics", routes.metrics),
            Route("/openapi.json", routes.openapi),
            Route("/v1/models", routes.models),
            Route("/v1/examples", routes.examples),
            Route("/v1/versions", routes.versions),
            Route("/v1/answers", routes.answers, methods=["POST"]),
            Route("/v1/retrieve", routes.retrieve, methods=["POST"]),
            Route("/v1/passages", routes.change, methods=["POST"]),
            Route("/v1/passages/{id:path}", routes.passage, methods=["GET"]),
            Route("/v1/passages/{id:path}", routes.delete, methods=["DELETE"]),
            Mount("/static", StaticFiles(directory=_STATIC), name="static"),
        ],
        exception_handlers={Exception: _told, HTTPException: _told_by_routing},
        lifespan=routes.lifespan,
    )
    app.router.redirect_slashes = False  # a redirect would repeat what the header Host says
    config = service.config
    names = allowed_names(config.host, config.names)
    guarded = Guard(app, service.metrics, key, names, _is_public, is_full)
    if not config.origins:
        return guarded
    return CORSMiddleware(
        guarded,
        allow_origins=config.origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("authorization", "content-type", "x-request-id"),
        expose_headers=("retry-after", "x-request-id"),
    )


def _is_public(path: str) -> bool:
    return path in _PUBLIC or path.startswith("/static/")


async def _told(request: Request, error: Exception) -> Response:
    return problem_response(error, request.state.request_id)


async def _told_by_routing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is no such page", 405: f"{request.method} is not for this page"}
    detail = words.get(error.status_code, error.detail)
    refusal = Refused(error.status_code, detail, dict(error.headers or {}))
    return problem_response(refusal, request.state.request_id)


class _Routes:
    """What answers each route."""

    def __init__(self, service: Service, name: str, has_key: bool) -> None:
        self._service, self._name, self._has_key = service, name, has_key
        self._config: ServeConfig = service.config
        self._examples = Examples(service.config.examples)
        self._patient = ThreadPoolExecutor(_PATIENT, "atlas-jax-patient")

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Load while the server already listens; answer what waits before it ends."""
        del app
        self._service.start()
        yield
        await asyncio.to_thread(self._service.stop)
        self._patient.shutdown(wait=False, cancel_futures=True)

    async def explorer(self, request: Request) -> Response:
        """The page."""
        del request
        return FileResponse(f"{_STATIC}/index.html", headers={"cache-control": "no-cache"})

    async def healthz(self, request: Request) -> Response:
        """Whether the process lives."""
        del request
        return json_response(StatusReply(status="alive"))

    async def readyz(self, request: Request) -> Response:
        """Whether questions are answered: every program is compiled."""
        del request
        state, ready = self._service.state, self._service.is_ready
        return json_response(StatusReply(status=state), 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Figures for Prometheus."""
        del request
        return Response(self._service.metrics.text(), media_type=metrics.MEDIA_TYPE)

    async def openapi(self, request: Request) -> Response:
        """The description of all this."""
        del request
        return JSONResponse(description())

    async def models(self, request: Request) -> Response:
        """What is served."""
        del request
        engine, config = self._service.engine, self._config
        told = engine.atlas.told
        searches = engine.atlas.store is not None
        model = ModelReply(
            id=self._name,
            task=told.task.name,
            parameters=engine.parameters(),
            k=min(told.read.k, engine.deepest),
            compiled_ks=engine.ks,
            batch_rows=engine.batch_rows,
            explain=config.explain and searches,
            max_choices=config.max_choices if engine.takes_choices else 0,
            max_excluded=config.max_excluded if searches else 0,
            max_replaced=config.max_replaced if searches else 0,
            max_questions=config.max_questions,
            max_characters=config.max_characters,
            max_text=config.max_text,
            decoding=[told.generation.method, *config.decoding],
            index=self._service.index(),
        )
        return json_response(ModelsReply(data=[model]))

    async def examples(self, request: Request) -> Response:
        """Questions to try, and passages of the corpus."""
        del request
        atlas = self._service.engine.atlas

        def look() -> ExamplesReply:
            with atlas.reading():
                return self._examples.reply(atlas.store)

        return json_response(await asyncio.to_thread(look))

    async def passage(self, request: Request) -> Response:
        """One passage of the corpus."""
        store, wanted = self._service.engine.atlas.store, request.path_params["id"]
        if len(wanted) > self._config.max_characters or store is None or not wanted:
            raise Refused(404, "no passage of the corpus has this id")

        def look() -> PassageReply | None:
            with self._service.engine.atlas.reading():
                row = store.find(wanted)
                return None if row is None else stored_reply(store.passage(row))

        found = await asyncio.to_thread(look)
        if found is None:
            raise Refused(404, f"no passage of the corpus has the id {wanted!r}")
        return json_response(found)

    async def versions(self, request: Request) -> Response:
        """The versions of the passages, the newest first, and what each changed."""
        store = self._service.engine.atlas.store
        if not isinstance(store, LivingStore):
            raise Refused(400, "a closed book has no versions: load passages, a store or an index")
        before = request.query_params.get("before", "")
        if before and not (before.isdecimal() and len(before) < _DIGITS):
            raise Refused(400, f"before = {before[:_DIGITS]!r}: expected the number of a version")
        earlier = self._service.serves_earlier
        return json_response(
            await asyncio.to_thread(versions_reply, store, int(before or 0), earlier)
        )

    async def change(self, request: Request) -> Response:
        """Add, replace and delete passages, as one version."""
        self._check_changes()
        sent = await read_request(request, PassagesRequest, self._config)
        return await self._changed(request, changes_of(sent, self._config), sent.delete)

    async def delete(self, request: Request) -> Response:
        """Delete one passage."""
        self._check_changes()
        wanted = request.path_params["id"]
        await self.passage(request)  # 404 if there is none
        return await self._changed(request, [], [wanted])

    def _check_changes(self) -> None:
        if not self._has_key:
            raise Refused(403, "this server has no API key, and without one changes nothing")
        if self._service.engine.atlas.store is None:
            raise Refused(400, "there is no corpus to change: load passages, a store or an index")

    async def _changed(
        self, request: Request, passages: list[dict[str, str]], delete: list[str]
    ) -> Response:
        changed, index = await self._patiently(self._service.change, passages, delete)
        request.state.log |= {"passages": len(passages), "deleted": len(delete)}
        told = request.state.request_id
        return json_response(ChangedReply(**changed, index=index, request_id=told))

    async def answers(self, request: Request) -> Response:
        """Answer questions."""
        sent = await read_request(request, AnswersRequest, self._config)
        if sent.stream:
            return await self._streamed(request, sent)
        settings = (True, sent.explain, sent.decoding, str(sent.as_of))
        done = await self._all(request, sent, lambda asked: self._service.submit(asked, *settings))
        return json_response(
            AnswersReply(
                answers=[answer_reply(one) for one in done],
                index=done[0].index,
                request_id=request.state.request_id,
            )
        )

    async def retrieve(self, request: Request) -> Response:
        """Find passages."""
        sent = await read_request(request, RetrieveRequest, self._config)
        if self._service.engine.atlas.store is None:
            raise Refused(400, "there is no corpus to search: load passages, a store or an index")
        done = await self._all(
            request,
            sent,
            lambda asked: self._service.submit(asked, False, False, "", str(sent.as_of)),
        )
        return json_response(
            RetrieveReply(
                results=[found_reply(one) for one in done],
                index=done[0].index,
                request_id=request.state.request_id,
            )
        )

    async def _all(
        self,
        request: Request,
        sent: AnswersRequest | RetrieveRequest,
        submit: Callable[[Any], list[Ticket]],
    ) -> list[Done]:
        """The answers of all questions; a client that leaves gives up its places."""
        tickets = await self._submitted(request, sent, submit)
        leaves = asyncio.create_task(_disconnected(request))
        everything = asyncio.gather(*(answer_to(self._service, one) for one in tickets))
        try:
            await asyncio.wait((everything, leaves), return_when=asyncio.FIRST_COMPLETED)
            if everything.done():
                return everything.result()
            self._service.metrics.left.inc(len(tickets))
            raise Refused(CLIENT_LEFT, "the client left")
        finally:
            leaves.cancel()
            everything.cancel()
            await asyncio.gather(leaves, everything, return_exceptions=True)
            self._service.queue.withdraw(tickets)

    async def _submitted(
        self,
        request: Request,
        sent: AnswersRequest | RetrieveRequest,
        submit: Callable[[Any], list[Ticket]],
    ) -> list[Ticket]:
        asked, log = asked_of(sent, self._config), request.state.log
        log |= {"questions": len(asked), "k": sent.k}
        if self._config.log_questions:
            log["texts"] = [one.text for one in asked]
        # An earlier version may have to be loaded first.
        call = self._patiently if str(sent.as_of) else asyncio.to_thread
        return await call(submit, asked)

    async def _patiently(self, function: Callable[..., T], *args: Any) -> T:
        """Call what may take seconds, in threads that no other request needs."""
        return await asyncio.get_running_loop().run_in_executor(self._patient, function, *args)

    async def _streamed(self, request: Request, sent: AnswersRequest) -> Response:
        loop, events = asyncio.get_running_loop(), Events(self._service, request.state.request_id)
        texts = [sent.questions] if isinstance(sent.questions, str) else sent.questions

        def later(tell: Callable[..., None], *told: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(tell, *told)

        def on_found(number: int, passages: tuple[Passage, ...]) -> None:
            later(events.found, number, texts[number], passages)

        def on_text(number: int, text: str) -> None:
            later(events.wrote, number, text)

        def submit(asked: Any) -> list[Ticket]:
            settings = (True, sent.explain, sent.decoding, str(sent.as_of))
            return self._service.submit(asked, *settings, on_found, on_text)

        tickets = await self._submitted(request, sent, submit)
        return EventsResponse(self._service, events, tickets)


async def _disconnected(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
