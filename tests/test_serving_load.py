"""`benchmarks.serving`: what Locust's users ask of a server, and what is read of it."""

import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("locust") is None, reason="needs the extra [bench]"
    ),
]


@pytest.fixture
def server() -> Iterator[Any]:
    """It answers a question with itself, and refuses each one whose number has a 7."""
    asked: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((self.path, body))
            reply = json.dumps({"answers": [{"answer": body["questions"]}]}).encode()
            self.send_response(429 if "7" in body["questions"] else 200)
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield listening.server_port, asked
        listening.shutdown()


def test_so_many_requests_are_made_and_each_status_is_counted(server: Any) -> None:
    from benchmarks import serving

    port, asked = server
    questions = [f"q{number}" for number in range(10)]
    found = serving.locust(port, questions, 3, count=100, k=2)
    assert found.requests == len(asked) == 100
    assert found.of("200", "requests") == 90 and found.of("429", "requests") == 10
    assert found.answers == {one: one for one in questions if one != "q7"}
    assert 0 < found.of("200", "p50") <= found.of("200", "p99")
    assert found.of("200", "a second") > 0 and found.of("503", "requests") == 0
    assert {path for path, _ in asked} == {"/v1/answers"} and asked[0][1]["k"] == 2
    asked.clear()
    mixed = serving.locust(port, questions[:7], 3, count=100, k=1, kind="mixed")
    assert mixed.of("200", "requests") == 100
    paths = [path for path, _ in asked]
    assert paths.count("/v1/answers") == 4 and paths.count("/v1/retrieve") == 96
    assert sum("stream" in body for _, body in asked) == 2


def test_an_open_loop_asks_at_its_rate_and_a_dead_server_is_told(server: Any) -> None:
    from benchmarks import serving

    port, asked = server
    found = serving.opened(port, ["q1", "q2"], rate=40.0, seconds=3, users=30)
    # About 120; fewer where the machine is busy, since users begin later then.
    assert found.requests == len(asked) and 20 < found.requests < 200
    with pytest.raises(SystemExit, match="of the closed loop was not answered: {'0'"):
        serving.closed(1, ["q1"], 1, 2)
