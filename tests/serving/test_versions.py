"""The same question as of an earlier version: equal to `ask --as_of`, nothing compiled, bounded."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import pytest

import atlas_jax
from atlas_jax.core.errors import UserError
from atlas_jax.serving.editions import Editions
from atlas_jax.serving.problems import Refused
from atlas_jax.serving.run import Server
from tests.serving.served import ask, load_kept, send, serving

KEY = "a-key-of-the-test"
HEAD = {"authorization": f"Bearer {KEY}"}
QUESTION = "What is the capital of Arvo?"
FIELDS: tuple[dict[str, Any], ...] = ({"k": 4}, {"k": 4, "explain": True})


def change(server: Server, passages: list[dict[str, str]], delete: tuple[str, ...] = ()) -> None:
    reply = send(server, "/v1/passages", {"passages": passages, "delete": list(delete)}, **HEAD)
    assert reply.status == 200, reply.body


def test_the_same_question_as_of_an_earlier_version(kept: Path, monkeypatch) -> None:
    monkeypatch.setenv("ATLAS_JAX_API_KEY", KEY)
    compiled: list[str] = []
    with serving(load_kept(kept), max_choices=0, max_replaced=0, earlier=1) as server:
        first = send(server, "/v1/answers", {"questions": QUESTION}, **HEAD).json["answers"][0]
        ids = [one["id"] for one in first["passages"]]
        for number in range(3):
            text = f"The capital of Arvo is Nova {number}."
            change(server, [{"id": ids[0], "title": "Arvo", "text": text}])
        change(server, [{"id": "fresh", "title": "Arvo", "text": "Arvo is large."}], (ids[1],))
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, _seconds, **_: compiled.append(name) if "compile" in name else None
        )
        # Each has the one place for earlier versions after another.
        replies = {}
        for as_of in (0, 2, "3", 4, 0, ""):
            for number, fields in enumerate(FIELDS):
                body = {"questions": QUESTION, "as_of": as_of, **fields}
                replies[as_of, number] = send(server, "/v1/answers", body, **HEAD)
        found = send(server, "/v1/retrieve", {"questions": QUESTION, "as_of": 0}, **HEAD).json
        listed = send(server, "/v1/versions", **HEAD).json
        older = send(server, "/v1/versions?before=2", **HEAD).json
        assert compiled == []
        time = listed["versions"][2]["time"]
        body = {"questions": QUESTION, "as_of": time}
        by_time = send(server, "/v1/answers", body, **HEAD).json
        gone = {"questions": QUESTION, "as_of": 9}
        missing = send(server, "/v1/answers", gone, **HEAD)
        exclude = {"questions": QUESTION, "as_of": 0, "exclude": ["fresh"]}
        unknown = send(server, "/v1/retrieve", exclude, **HEAD)
        assert send(server, "/v1/versions?before=x", **HEAD).status == 400
    for (as_of, number), reply in replies.items():
        answer, expected = reply.json["answers"][0], load_kept(kept, as_of=as_of).ask(
            QUESTION, **FIELDS[number]
        )  # fmt: skip
        assert answer["index"]["passages_version"] == (4 if as_of == "" else int(as_of))
        assert answer["answer"] == expected.text
        assert answer["log_probability"] == expected.log_probability
        for one, passage in zip(answer["passages"], expected.passages, strict=True):
            assert {name: getattr(passage, name) for name in one} == one
    assert [one["id"] for one in found["results"][0]["passages"]][:3] == ids
    assert by_time["index"]["passages_version"] == 2
    assert missing.status == 400 and "has the versions 0 to 4" in missing.json["detail"]
    assert missing.headers["content-type"] == "application/problem+json"
    assert "no passage of the corpus has the id 'fresh'" in unknown.json["detail"]
    assert [one["version"] for one in listed["versions"]] == [4, 3, 2, 1, 0]
    assert [one["version"] for one in older["versions"]] == [1, 0]
    newest = {name: listed["versions"][0][name] for name in ("added", "replaced", "deleted")}
    assert newest == {"added": 1, "replaced": 0, "deleted": 1}
    assert (listed["serving"], listed["oldest"], listed["earlier"]) == (4, 0, True)
    _compacted_versions_are_refused(kept)


def _compacted_versions_are_refused(kept: Path) -> None:
    atlas_jax.compact_index(store=kept / "store", index=kept / "index")
    with pytest.raises(UserError, match="has the versions 5 to 5"):
        load_kept(kept).earlier("2")


def test_what_cannot_be_asked_is_refused(server: Server, atlas: Any) -> None:
    body = {"questions": QUESTION, "as_of": 0}
    assert send(server, "/v1/versions").json["earlier"] is False
    refused = send(server, "/v1/answers", body)
    assert refused.status == 400 and "CorpusConfig.index" in refused.json["detail"]
    assert send(server, "/v1/answers", {**body, "as_of": "soon"}).status == 400
    assert send(server, "/v1/answers", {**body, "as_of": -1}).status == 400
    with serving(atlas, explain=False, max_choices=0, max_replaced=0, earlier=0) as other:
        refused = send(other, "/v1/retrieve", body)
        assert refused.status == 400 and "ServeConfig.earlier" in refused.json["detail"]
        assert ask(other, QUESTION)[0]["passages"]


def test_places_for_versions_are_bounded_and_given_back() -> None:
    loads: list[str] = []

    def load(number: str) -> Any:
        loads.append(number)
        if number == "9":
            raise UserError("no version 9")
        return object()

    editions = Editions(2, load, seconds=5)
    one, two = editions.take(1, 2), editions.take(2, 1)
    assert editions.take(1, 1) is one and loads == ["1", "2"]
    with pytest.raises(Refused, match=r"ServeConfig\.earlier"):
        editions.take(3, 1)
    editions.give_back(2)
    assert editions.take(2, 1) is two  # it was kept
    editions.give_back(2)
    with pytest.raises(UserError, match="no version 9"):
        editions.take(9, 1)
    assert editions.take(3, 1) is not two and loads == ["1", "2", "9", "3"]


def test_a_version_is_loaded_once_for_all_who_wait() -> None:
    held, loads = threading.Event(), []

    def load(number: str) -> Any:
        loads.append(number)
        held.wait(10)
        return number

    editions = Editions(1, load, seconds=10)
    with ThreadPoolExecutor(4) as threads:
        taken = [threads.submit(editions.take, 7, 1) for _ in range(4)]
        held.set()
        assert {one.result() for one in taken} == {"7"} and loads == ["7"]
