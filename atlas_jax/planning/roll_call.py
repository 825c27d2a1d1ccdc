"""Check, before JAX joins the processes of a run, that all of them reach process 0.

If one is missing, JAX aborts the others without saying which one or why. Here process 0 listens at
the coordinator's port, and each other process introduces itself there. All get the same answer.
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
_STRANGER_SECONDS = 5.0  # time for a process that connects to introduce itself
_ANSWER_SECONDS = 10.0  # further wait for process 0, which may have started later


@dataclasses.dataclass(frozen=True, order=True)
class Caller:
    """One process, as it introduces itself."""

    index: int
    count: int
    host: str
    pid: int

    @property
    def name(self) -> str:
        """Name of the process for people."""
        return f"process {self.index} ({self.host})"


def roll_call(address: str, index: int, count: int, timeout: float) -> list[str]:
    """Meet the other processes. Returns the faults, none if all processes are there.

    Args:
      address: HOST:PORT of process 0.
      index, count: number of this process, and how many processes it expects.
      timeout: seconds to wait for the others.
    """
    host, _, port = address.rpartition(":")
    me = Caller(index, count, socket.gethostname(), os.getpid())
    if index == 0:
        return _listen(me, int(port), timeout)
    return _report(me, (host.strip("[]"), int(port)), timeout)


def _listen(me: Caller, port: int, timeout: float) -> list[str]:
    """Process 0: listen to the others and answer them."""
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
            with contextlib.suppress(OSError, ValueError, TypeError):  # not a process of this run
                connection.settimeout(_STRANGER_SECONDS)
                heard[Caller(*_read(connection))] = connection
        faults = _faults(me, heard, timeout)
        for connection in heard.values():
            with contextlib.suppress(OSError):  # the process has given up
                _write(connection, {"faults": faults})
    return faults


def _faults(me: Caller, heard: Iterable[Caller], timeout: float) -> list[str]:
    """Faults among the processes that process 0 has heard."""
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
    """Other processes: report to process 0, which may start later, and wait for its answer."""
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
      OSError: no line comes.
      ValueError: the line is not JSON.
    """
    with connection.makefile("rb") as lines:
        return json.loads(lines.readline(1 << 16))
