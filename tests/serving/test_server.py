"""The routes: answers as `ask` gives them, nothing compiled, the words of the commands."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import pytest

from atlas_jax.answering.asked import Asked
from atlas_jax.answering.atlas import Atlas
from atlas_jax.core.errors import UserError
from atlas_jax.serving.config import ServeConfig
from atlas_jax.serving.engine import Engine
from atlas_jax.serving.events import Events, EventsResponse
from atlas_jax.serving.problems import Refused
from atlas_jax.serving.queue import Ticket
from atlas_jax.serving.run import Server, api_key
from atlas_jax.serving.service import Service
from tests.serving.served import CONFIG, ask, send, serving

QUESTIONS = ["What is the capital of Arvo?", "What is the capital of Bera?"]


def test_answers_equal_those_of_ask_to_the_bit(atlas: Atlas, server: Server) -> None:
    ids = [one.id for one in atlas.retrieve(QUESTIONS[0], k=3)]
    several: tuple[dict, ...] = (
        {"k": 4},
        {"k": 4, "explain": True},
        {"k": 4, "exclude": ids[:1]},
        # Two edits, for which the server's programs are made: the shape is the same.
        {
            "k": 4,
            "replace": {ids[1]: "The capital of Arvo is Nowhere.", ids[0]: "A large city."},
            "explain": True,
        },
        {"k": 4, "choices": ["Lindel", "Tomund"]},
    )
    for fields in several:
        expected, found = atlas.ask(QUESTIONS[0], **fields), ask(server, QUESTIONS[0], **fields)[0]
        assert found["answer"] == expected.text
        assert found["log_probability"] == expected.log_probability
        assert len(found["passages"]) == len(expected.passages)
        for one, passage in zip(found["passages"], expected.passages, strict=True):
            assert {name: getattr(passage, name) for name in one} == one


def test_a_k_between_two_programs_is_read_by_the_larger(atlas: Atlas, server: Server) -> None:
    engine = Engine(atlas, ServeConfig(ks=(8, 2, 99)))
    assert engine.ks == [2, 8, 16]  # there are 16 passages
    assert [engine.kind(Asked("x", k=k)).k for k in (0, 1, 2, 3, 9)] == [8, 2, 2, 8, 16]
    expected, found = atlas.ask(QUESTIONS[0], k=3, explain=True), ask(server, QUESTIONS[0], k=3,
                                                                      explain=True)[0]  # fmt: skip
    assert [one["id"] for one in found["passages"]] == [one.id for one in expected.passages]
    assert found["answer"] == expected.text
    assert found["log_probability"] == pytest.approx(expected.log_probability, abs=1e-4)
    for one, passage in zip(found["passages"], expected.passages, strict=True):
        assert one["left_out"] == pytest.approx(passage.left_out, abs=1e-3)


def test_as_many_are_joined_as_take_the_least_time_each(atlas: Atlas) -> None:
    engine = Engine(atlas, ServeConfig(ks=(2,)))
    engine.batch_rows = [1, 4, 16]  # whatever the mesh of the tests has
    kind = engine.kind(Asked("x", k=2))

    def chosen(*seconds: float) -> list[int]:
        engine._seconds = {(kind, rows): s for rows, s in zip((1, 4, 16), seconds, strict=True)}
        return [engine.best_batch(kind, waiting) for waiting in (1, 2, 3, 4, 5, 16, 40)]

    # As a chip does: rows cost nothing. As a small CPU does: each row costs the same.
    assert chosen(1, 1, 1) == [1, 2, 3, 4, 5, 16, 16]
    assert chosen(1, 4, 16) == [1, 1, 1, 4, 4, 16, 16]
    # Sixteen rows fall out of the cache.
    assert chosen(1, 2, 12) == [1, 2, 3, 4, 4, 4, 4]


def test_waiting_questions_are_joined_and_nothing_is_compiled(server: Server) -> None:
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _seconds, **_: compiled.append(name) if "compile" in name else None
    )
    some = [one["id"] for one in ask(server, QUESTIONS[0])[0]["passages"]]
    kinds = [
        {"k": k, "explain": explain, **more}
        for k in (1, 2, 4)
        for explain in (False, True)
        for more in ({}, {"replace": {some[0]: "A text."}}, {"exclude": some[:1]},
                     {"choices": ["a b", "c d"]})
    ] * 2  # fmt: skip
    alone = [ask(server, QUESTIONS[0], **kind)[0] for kind in kinds[:24]]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda kind: ask(server, QUESTIONS, **kind)[0], kinds))
        searched = list(
            threads.map(
                lambda k: send(server, "/v1/retrieve", {"questions": QUESTIONS, "k": k}).json,
                (1, 2, 3, 4),
            )
        )
    assert compiled == []
    assert [one["answer"] for one in together] == [one["answer"] for one in alone * 2]
    assert max(one["timings"]["batch"] for one in together) >= 2
    assert [len(one["results"][1]["passages"]) for one in searched] == [1, 2, 3, 4]


def events_of(reply: Any) -> list[tuple[str, Any]]:
    assert reply.headers["content-type"].startswith("text/event-stream")
    parts = (one.split("\n", 1) for one in reply.body.decode().strip().split("\n\n"))
    return [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in parts
    ]


def test_passages_come_first_then_tokens_then_the_same_answer(server: Server) -> None:
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _seconds, **_: compiled.append(name) if "compile" in name else None
    )
    for fields in ({"k": 2}, {"k": 4, "explain": True}, {"k": 4, "choices": ["a b", "c d"]}):
        whole = ask(server, QUESTIONS, **fields)
        body = {"questions": QUESTIONS, **fields, "stream": True}
        events = events_of(send(server, "/v1/answers", body))
        assert [name for name, _ in events][-1] == "done"
        for number, answer in enumerate(whole):
            mine = [(name, e) for name, e in events if e.get("index") == number]
            names = [name for name, _ in mine]
            written = [e["text"] for name, e in mine if name == "tokens"]
            assert names == ["passages", *["tokens"] * len(written), "answer"]
            # A choice is made at the end.
            assert bool(written) == (bool(answer["answer"]) and "choices" not in fields)
            read = mine[-1][1]["answer"]
            assert written[-1:] in ([], [answer["answer"]])
            assert [one["id"] for one in mine[0][1]["passages"]] == [
                one["id"] for one in answer["passages"]
            ]
            for name in ("answer", "log_probability", "passages"):
                assert read[name] == answer[name]
    assert compiled == []


def test_operators_find_what_they_expect(server: Server) -> None:
    assert send(server, "/healthz").json == {"status": "alive"}
    assert send(server, "/readyz").json == {"status": "ready"}
    figures = send(server, "/metrics").body.decode()
    assert "atlas_jax_ready 1.0" in figures and "atlas_jax_questions_total" in figures
    model = send(server, "/v1/models").json["data"][0]
    assert (model["compiled_ks"], model["index"]["passages"]) == ([4], 16)
    asks = {"access_control_request_method": "GET", "origin": "https://app.example"}
    refused = send(server, "/v1/models", method="OPTIONS", **asks)
    assert refused.status == 405 and "access-control-allow-origin" not in refused.headers
    first = send(server, "/v1/examples").json["passages"][0]
    assert send(server, f"/v1/passages/{first['id']}").json == first
    described = send(server, "/openapi.json").json
    for path, reference in (("/v1/answers", "AnswersRequest"), ("/v1/retrieve", "RetrieveRequest")):
        body = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert body["schema"]["$ref"].endswith(reference)
        assert "k" in described["components"]["schemas"][reference]["properties"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"questions": " "}, "the question is empty; type what you want to know"),
        ({"questions": []}, "questions is empty"),
        ({"questions": "x", "k": 5}, "this server finds up to 4 passages (ServeConfig.ks)"),
        ({"questions": "x", "exclude": ["no"]}, "no passage of the corpus has the id 'no'"),
        ({"questions": "x", "kk": 5}, "kk"),
        ({"questions": "x", "k": "5"}, "k"),
        ({"questions": ["x"] * 5}, "takes up to 4 at once"),
        ({"questions": "x" * 201}, "201 characters, more than 200"),
        ({"questions": "x", "decoding": "beam"}, "this server has 'greedy'"),
        ({"questions": "x", "choices": ["a", "a"]}, "two or more different texts"),
    ],
)
def test_a_fault_is_told_in_the_words_of_the_commands(server: Server, fields, words) -> None:
    reply = send(server, "/v1/answers", fields, x_request_id="mine-1")
    assert reply.status == 400 and reply.headers["content-type"] == "application/problem+json"
    assert words in reply.json["detail"]
    assert reply.json["request_id"] == reply.headers["x-request-id"] == "mine-1"


def test_a_full_queue_refuses_at_once_and_keeps_what_it_took(atlas: Atlas) -> None:
    with serving(atlas, explain=False, max_choices=0, max_replaced=0, queue=6) as server:
        answer, held = server.service.engine.answer, threading.Event()
        taken: list[int] = []

        def slowly(*args):
            taken.append(len(args[1]))
            held.wait(10)
            return answer(*args)

        server.service.engine.answer = slowly  # type: ignore[method-assign]
        with ThreadPoolExecutor(12) as threads:
            sent = [
                threads.submit(send, server, "/v1/answers", {"questions": QUESTIONS[0]})
                for _ in range(12)
            ]
            until = time.monotonic() + 10
            while (
                time.monotonic() < until
                and (sum(one.done() for one in sent) + len(server.service.queue) + sum(taken)) < 12
            ):
                time.sleep(0.01)
            assert time.monotonic() < until
            leaver = http.client.HTTPConnection("127.0.0.1", server.address[1])
            refused = [one.result() for one in sent if one.done()]
            assert {one.status for one in refused} == {429}
            assert all(int(one.headers["retry-after"]) >= 1 for one in refused)
            leaver.close()
            held.set()
            replies = [one.result() for one in sent]
        statuses = sorted(one.status for one in replies)
        assert statuses == [200] * statuses.count(200) + [429] * len(refused)
        assert statuses.count(200) >= 6


def test_a_client_that_leaves_frees_its_place_and_a_late_question_is_given_up(
    atlas: Atlas,
) -> None:
    settings = {"explain": False, "max_choices": 0, "max_replaced": 0}
    with serving(atlas, **settings, deadline_seconds=1.0) as server:
        answer, held = server.service.engine.answer, threading.Event()
        server.service.engine.answer = lambda *a: (held.wait(10), answer(*a))[1]  # type: ignore
        body = json.dumps({"questions": QUESTIONS[0]}).encode()
        clients = []
        for _ in range(3):  # the first is being answered, two wait
            client = http.client.HTTPConnection("127.0.0.1", server.address[1])
            client.request("POST", "/v1/answers", body, {"content-type": "application/json"})
            clients.append(client)
            time.sleep(0.1)
        assert len(server.service.queue) == 2
        clients[1].close()
        until = time.monotonic() + 5
        while len(server.service.queue) > 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert len(server.service.queue) == 1
        late = clients[2].getresponse()
        assert late.status == 504 and b"no answer within 1 s" in late.read()
        held.set()
        clients[0].close()
        clients[2].close()
        figures = send(server, "/metrics").body.decode()
        assert 'status="499"' in figures and 'status="500"' not in figures


def test_more_connections_than_were_told_are_refused(atlas: Atlas) -> None:
    settings = {"explain": False, "max_choices": 0, "max_replaced": 0, "connections": 2}
    with serving(atlas, **settings) as server, contextlib.ExitStack() as opened:
        for _ in range(2):
            one = http.client.HTTPConnection("127.0.0.1", server.address[1])
            opened.callback(one.close)
            one.connect()
            one.request("GET", "/healthz")
            assert one.getresponse().read() == b'{"status":"alive"}'  # it stays open
        reply = send(server, "/healthz")
        assert reply.status == 503 and "ServeConfig.connections" in reply.json["detail"]
        assert reply.headers["content-type"] == "application/problem+json"
        opened.close()
        until = time.monotonic() + 10
        while send(server, "/healthz").status != 200:
            assert time.monotonic() < until


def test_a_client_that_left_before_the_first_event_frees_its_place() -> None:
    service = Service(CONFIG, lambda: pytest.fail("not needed"), lambda: None)
    tickets = [Ticket(Asked(text), "kind", time.monotonic() + 30) for text in QUESTIONS]
    service.queue.offer(tickets)

    async def left() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def sent(_message: Any) -> None:
        await asyncio.sleep(0)

    response = EventsResponse(service, Events(service, "id"), tickets)
    call = response({"type": "http", "asgi": {"spec_version": "2.3"}}, left, sent)
    with ThreadPoolExecutor(1) as other:  # an open browser has its event loop in this thread
        other.submit(asyncio.run, call).result()
    assert len(service.queue) == 0 and all(one.answered.cancelled() for one in tickets)
    assert b"atlas_jax_questions_left_total 2.0" in service.metrics.text()


def test_a_key_is_needed_where_others_can_come(
    atlas: Atlas, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    with pytest.raises(UserError, match="can be reached by others: set an API key"):
        api_key(ServeConfig(host="0.0.0.0"))
    (tmp_path / "key").write_text("short\n")
    with pytest.raises(UserError, match="16 characters or more"):
        api_key(ServeConfig(api_key_file=str(tmp_path / "key")))
    monkeypatch.setenv("ATLAS_JAX_API_KEY", "a key of 24 characters..")
    settings = {"explain": False, "max_choices": 0, "max_replaced": 0}
    with pytest.raises(UserError, match=r"ServeConfig.origins = '\*': expected scheme"):
        ServeConfig(origins=("*",))
    with serving(atlas, **settings, origins=("https://app.example",)) as server:
        path, body = "/v1/answers", {"questions": QUESTIONS[0]}
        for wrong in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic abc"}):
            reply = send(server, path, body, **wrong)
            assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer"
        right = {"authorization": "Bearer a key of 24 characters.."}
        reply = send(server, path, body, **right, origin="https://app.example")
        assert reply.status == 200
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        # A browser asks first, without the key.
        asks = {"access_control_request_method": "POST", "origin": "https://app.example"}
        asks["access_control_request_headers"] = "authorization, content-type"
        assert send(server, path, method="OPTIONS", **asks).status == 200
        asks["origin"] = "https://evil.example"
        assert send(server, path, method="OPTIONS", **asks).status == 400
        assert "access-control-allow-origin" not in send(server, path, body, **asks).headers
        assert send(server, "/metrics").status == 401
        # However many change passages, questions do not wait for them.
        held, ended = threading.Event(), []

        def slowly(*_):
            ended.append(held.wait(20))
            raise Refused(503, "it was held")

        monkeypatch.setattr(server.service, "change", slowly)
        with ThreadPoolExecutor(40) as threads:
            changes = [
                threads.submit(send, server, "/v1/passages", {"delete": ["x"]}, **right)
                for _ in range(40)
            ]
            time.sleep(1)
            assert send(server, path, body, **right).status == 200
            assert ended == []
            held.set()
            assert {one.result().status for one in changes} == {503}
        assert send(server, "/healthz").status == send(server, "/").status == 200
