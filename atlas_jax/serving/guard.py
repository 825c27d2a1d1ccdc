"""What every request passes: its id, host name, API key, headers, log, and how it ends."""

import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atlas_jax.serving.config import LOOPBACK
from atlas_jax.serving.logs import event
from atlas_jax.serving.metrics import Metrics
from atlas_jax.serving.problems import Refused, problem_response, refused

_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
# Nothing is loaded from another host, nothing inline runs, and nobody may frame the page.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ASKED_OFTEN = ("healthz", "readyz", "metrics")  # by machines, and told only when debugging
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


class Guard:
    """An ASGI application around the server's own."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        key: str,
        names: Collection[str],
        open_paths: Callable[[str], bool],
        is_full: Callable[[], bool],
    ) -> None:
        """Guard an application.

        Args:
          metrics: counts the requests.
          key: what a client must send; "" = nothing.
          names: host names by which the server may be called; none = any.
          open_paths: whether a path is for everybody, without a key.
          is_full: whether there are more connections than the server takes.
        """
        self._app, self._metrics, self._key = app, metrics, key.encode()
        self._names, self._open, self._is_full = frozenset(names), open_paths, is_full

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; an error becomes a problem that tells no more than it should."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, start, status = Request(scope, receive), time.monotonic(), [0]
        given = request.headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "log": {}}

        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                own = {**_HEADERS, "x-request-id": request_id}
                present = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (n.encode(), v.encode())
                        for n, v in own.items()
                        if n.encode() not in present
                    ),
                ]
            await send(message)

        error: BaseException | None = None
        try:
            self._check(request)
            await self._app(scope, receive, reply)
        except Exception as caught:
            error = caught
            if status[0] == 0:
                await problem_response(caught, request_id)(scope, receive, reply)
        finally:
            self._note(scope, status[0], time.monotonic() - start, error)

    def _check(self, request: Request) -> None:
        if self._is_full():
            raise Refused(
                503,
                "too many connections are open (ServeConfig.connections)",
                {"retry-after": "5", "connection": "close"},
            )
        name = host_name(request.headers.get("host", ""))
        if self._names and name not in self._names:
            raise Refused(421, "this server does not go by the name in the header Host")
        if not self._key or self._open(request.url.path):
            return
        kind, _, sent = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(sent.strip().encode("utf-8", "replace"), self._key)
        if kind.lower() != "bearer" or not right:
            raise Refused(
                401,
                "an API key is needed: send authorization: Bearer KEY",
                {"www-authenticate": "Bearer"},
            )

    def _note(self, scope: Scope, status: int, seconds: float, error: BaseException | None) -> None:
        route = getattr(scope.get("endpoint"), "__name__", "other")
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        fields: dict[str, Any] = {
            "id": scope["state"]["request_id"],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "ms": round(1000 * seconds, 1),
            **scope["state"]["log"],
        }
        ours = error is not None and refused(error).status == 500
        level = logging.DEBUG if route in _ASKED_OFTEN else logging.ERROR if ours else logging.INFO
        event("request", level, error if ours else None, **fields)


def host_name(header: str) -> str:
    """The name in a Host header, in small letters, without the port."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1 : header.find("]")]
    return header.partition(":")[0]


def allowed_names(host: str, names: Collection[str]) -> set[str]:
    """The host names by which a server may be called; none = any.

    On this machine alone it is any of this machine's: so a page of another host, whose name
    somebody lets point at 127.0.0.1, cannot read what is served here.
    """
    if names:
        return {*map(str.lower, names)}
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host in LOOPBACK
    return {*LOOPBACK, host} if local else set()
