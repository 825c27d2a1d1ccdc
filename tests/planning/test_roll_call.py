"""All processes meet at the coordinator's port, or are told who is missing."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from atlas_jax.planning.roll_call import Caller, _faults, roll_call

HOST = socket.gethostname()


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def called(port: int, count: int, *indices: int, timeout: float = 20) -> list[list[str]]:
    """What each of these processes is told."""
    with ThreadPoolExecutor(len(indices)) as threads:
        told = [
            threads.submit(roll_call, f"127.0.0.1:{port}", index, count, timeout)
            for index in indices
        ]
        return [one.result() for one in told]


def test_who_are_all_there_hear_of_no_fault_and_leave_the_port_free(port: int) -> None:
    assert called(port, 3, 1, 2, 0) == [[], [], []]
    assert called(port, 3, 0, 1, 2) == [[], [], []]  # at once, at the same port
    assert roll_call(f"127.0.0.1:{port}", 0, 1, 20) == []


def test_all_are_told_who_is_missing(port: int) -> None:
    told = called(port, 4, 0, 2, timeout=0.5)
    sentence = f"process 1, 3 of 4 did not reach process 0 ({HOST}) within 0.5 seconds"
    assert [one[0].startswith(sentence) for one in told] == [True, True]
    assert len(told[0]) == 1 and told[0] == told[1]


def test_who_cannot_reach_the_port_says_so_with_its_name(port: int) -> None:
    ((told,),) = called(port, 2, 1, timeout=0.5)
    assert f"process 1 ({HOST}) cannot reach process 0 at 127.0.0.1:{port} within" in told
    assert "refused" in told
    ((told,),) = [roll_call("nowhere.invalid:1234", 1, 2, 0.1)]
    assert "at nowhere.invalid:1234" in told


def test_a_port_that_is_taken_is_named(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        (told,) = roll_call(f"127.0.0.1:{port}", 0, 2, 20)
    assert told.startswith(f"port {port} cannot be opened on process 0 ({HOST}): Address already")


def test_a_process_may_come_before_process_0_and_a_stranger_disturbs_nobody(port: int) -> None:
    with ThreadPoolExecutor(2) as threads:
        early = threads.submit(roll_call, f"127.0.0.1:{port}", 1, 3, 20)
        time.sleep(0.5)
        first = threads.submit(roll_call, f"127.0.0.1:{port}", 0, 3, 20)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"", b"7\n"):
            for _ in range(100):
                try:
                    with socket.create_connection(("127.0.0.1", port)) as stranger:
                        stranger.sendall(words)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
        assert roll_call(f"127.0.0.1:{port}", 2, 3, 20) == []
        assert (early.result(), first.result()) == ([], [])


@pytest.mark.parametrize("words", [b"HTTP/1.1 400 Bad Request\r\n", b"{}\n", b"[0]\n", b"\xff\n"])
def test_another_program_at_the_port_is_not_process_0(port: int, words: bytes) -> None:
    over = threading.Event()

    def answer(server: socket.socket) -> None:
        while not over.is_set():
            with contextlib.suppress(TimeoutError), server.accept()[0] as connection:
                connection.sendall(words)

    with socket.create_server(("127.0.0.1", port)) as server, ThreadPoolExecutor(1) as threads:
        server.settimeout(0.05)
        threads.submit(answer, server)
        (told,) = roll_call(f"127.0.0.1:{port}", 1, 2, 0.3)
        over.set()
    assert "cannot reach process 0" in told


def test_flags_that_do_not_fit_together_are_named() -> None:
    me = Caller(0, 3, "a", 7)
    heard = [Caller(1, 3, "b", 8), Caller(1, 3, "c", 8)]
    twice, missing = _faults(me, heard, 60)
    assert twice == "2 processes call themselves process 1, on b, c"
    assert missing.startswith("process 2 of 3 did not reach process 0 (a) within 60 seconds")
    (count,) = _faults(me, [Caller(1, 4, "b", 8), Caller(2, 3, "c", 9)], 60)
    assert count == "process 1 (b) expects 4 processes, process 0 (a) 3"
