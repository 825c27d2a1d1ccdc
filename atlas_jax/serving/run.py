"""Runs the server until it is told to stop."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from atlas_jax.answering.asked import check_typed
from atlas_jax.answering.atlas import Atlas
from atlas_jax.answering.run import AnswerRun
from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import utf8_text
from atlas_jax.serving.app import make_app
from atlas_jax.serving.config import API_KEY, ServeConfig
from atlas_jax.serving.logs import event, start_logging
from atlas_jax.serving.protocol import TimedProtocol
from atlas_jax.serving.service import Service
from atlas_jax.training.config import FINAL

_LEAST_KEY = 16  # characters


class Server:
    """One server.

    Attributes:
      service: what answers.
      address: host and port on which it listens.
    """

    def __init__(
        self, config: ServeConfig, told: AnswerRun, load: Callable[[], Atlas] | None = None
    ) -> None:
        """Check everything and begin to listen; `run` answers.

        Args:
          load: gives the models; None = they are loaded as `told` says.

        Raises:
          UserError: a setting at fault, or the address is taken.
        """
        check_typed(told)
        key = api_key(config)
        self.service = Service(config, load or (lambda: Atlas(told)), self.stop)
        app = make_app(self.service, key, _name(told.models.config.reader), self._is_full)
        self._socket = _listen(config.host, config.port)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        protocol = type("Protocol", (TimedProtocol,), {"head_seconds": config.body_seconds})
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=config.drain_seconds,
                h11_max_incomplete_event_size=16_384,
            )
        )

    def run(self) -> None:
        """Answer until SIGTERM, SIGINT or `stop`; then finish what is being answered.

        Raises:
          UserError: the models could not be loaded.
        """
        host, port = self.address
        event("listening", url=f"http://{f'[{host}]' if ':' in host else host}:{port}")
        with self._socket:
            self._server.run(sockets=[self._socket])
        event("stopped")
        if self.service.failure is not None:
            raise self.service.failure

    def _is_full(self) -> bool:
        return len(self._server.server_state.connections) > self.service.config.connections

    def stop(self) -> None:
        """Stop, from any thread."""
        self._server.should_exit = True


def serve(config: ServeConfig, told: AnswerRun) -> None:
    """Run a server in the main thread of a process.

    Raises:
      UserError: a setting or file at fault.
    """
    start_logging()
    server = Server(config, told)
    # uvicorn raises the signal again once it has drained: that is how the command ends.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    server.run()
    if server.service.is_running:  # in the compiler, which can be neither stopped nor left behind
        os._exit(0)


def api_key(config: ServeConfig) -> str:
    """The API key, from the file or the environment; "" if none is needed.

    Raises:
      UserError: it is missing where others can reach the server, or too short.
    """
    where, key = API_KEY, os.environ.get(API_KEY, "")
    if config.api_key_file:
        where = f"ServeConfig.api_key_file = {config.api_key_file!r}"
        try:
            key = utf8_text(Path(config.api_key_file).read_bytes(), where)
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}") from error
    key = key.strip()
    if not key and not config.is_local:
        raise UserError(
            f"ServeConfig.host = {config.host!r} can be reached by others: set an API key in the "
            f"environment variable {API_KEY} or in a file, ServeConfig.api_key_file"
        )
    if key and len(key) < _LEAST_KEY:
        raise UserError(f"{where}: an API key has {_LEAST_KEY} characters or more")
    return key


def _name(folder: str) -> str:
    """What a model is called: its folder, or that of the run whose last model it is."""
    path = Path(folder)
    return (path.parent.name if path.name == FINAL else path.name) or "atlas"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((host, port))
        except BaseException:
            made.close()
            raise
        return made
    except OSError as error:
        raise UserError(
            f"ServeConfig.host = {host!r}, ServeConfig.port = {port}: {error.strerror or error}; "
            "choose another"
        ) from error
