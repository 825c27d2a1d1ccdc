"""Whether all processes of a run reach process 0, asked before JAX joins them.

Where one is missing JAX aborts the others without saying which or why. Here process 0 listens at
the coordinator's port, each other process says there who it is, and all are given the same answer.
Afterwards the port is free for JAX.
"""

import collections
import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterable
from typing import Any

_RETRY_SECONDS = 0.2
_STRANGER_SECONDS = 5.0  # for who connects to say who it is
_ANSWER_SECONDS = 10.0  # for process 0, which may have begun later, beyond its own time-out


@dataclasses.dataclass(frozen=True, order=True)
class Caller:
    """One process, as it presents itself."""

    index: int
    count: int
    host: str
    pid: int

    @property
    def name(self) -> str:
        """How people find it."""
        return f"process {self.index} ({self.host})"


def roll_call(address: str, index: int, count: int, timeout: float) -> list[str]:
    """Meet the other processes; what is wrong, and nothing when all are there.

    Args:
      address: HOST:PORT of process 0.
      index, count: of this process, and how many it expects.
      timeout: seconds to wait for the others.
    """
    host, _, port = address.rpartition(":")
    me = Caller(index, count, socket.gethostname(), os.getpid())
    if index == 0:
        return _listen(me, int(port), timeout)
    return _report(me, (host.strip("[]"), int(port)), timeout)


def _listen(me: Caller, port: int, timeout: float) -> list[str]:
    """Process 0: hear the others and answer them."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        return [
            f"port {port} cannot be opened on {me.name}: {error.strerror}; end what holds it, "
            "or take another one"
        ]
    until = time.monotonic() + timeout
    with server, contextlib.ExitStack() as kept:
        heard: dict[Caller, socket.socket] = {}
        while len({one.index for one in heard}) < me.count - 1:
            try:
                server.settimeout(max(0.001, until - time.monotonic()))
                connection = kept.enter_context(server.accept()[0])
            except TimeoutError:
                break
            with contextlib.suppress(OSError, ValueError, TypeError):  # no process of ours
                connection.settimeout(_STRANGER_SECONDS)
                heard[Caller(*_read(connection))] = connection
        faults = _faults(me, heard, timeout)
        for connection in heard.values():
            with contextlib.suppress(OSError):  # it has given up
                _write(connection, {"faults": faults})
    return faults


def _faults(me: Caller, heard: Iterable[Caller], timeout: float) -> list[str]:
    """What is wrong with the processes that process 0 has heard."""
    faults = []
    by_index: dict[int, list[Caller]] = collections.defaultdict(list)
    for one in sorted(heard):
        by_index[one.index].append(one)
        if one.count != me.count:
            faults.append(f"{one.name} expects {one.count} processes, {me.name} {me.count}")
    for index, callers in by_index.items():
        if len(callers) > 1:
            hosts = ", ".join(one.host for one in callers)
            faults.append(f"{len(callers)} processes call themselves process {index}, on {hosts}")
    missing = [str(index) for index in range(1, me.count) if index not in by_index]
    if missing:
        faults.append(
            f"process {', '.join(missing)} of {me.count} did not reach {me.name} within "
            f"{timeout:g} seconds: is it started, and may it reach the coordinator's port?"
        )
    return faults


def _report(me: Caller, address: tuple[str, int], timeout: float) -> list[str]:
    """Any other process: tell process 0, which may not be there yet, and hear its answer."""
    until = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection(address, timeout=_STRANGER_SECONDS) as connection:
                connection.settimeout(timeout + _ANSWER_SECONDS)
                _write(connection, dataclasses.astuple(me))
                return list(_read(connection)["faults"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            reason = str(error)
        if time.monotonic() > until:
            host, port = address
            return [
                f"{me.name} cannot reach process 0 at {host}:{port} within {timeout:g} seconds "
                f"({reason}): is it started there, and does the network leave the port open?"
            ]
        time.sleep(_RETRY_SECONDS)


def _write(connection: socket.socket, value: Any) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def _read(connection: socket.socket) -> Any:
    """One line of JSON.

    Raises:
      OSError: nothing comes.
      ValueError: something else comes.
    """
    with connection.makefile("rb") as lines:
        return json.loads(lines.readline(1 << 16))
