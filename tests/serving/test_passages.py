"""Passages changed over HTTP: one version a batch, seen by the next question, kept after a kill."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import atlas_jax
from atlas_jax.index.living import LivingStore
from tests.serving.served import SETTINGS, ask, load_atlas, send, serving

ROOT = Path(__file__).parents[2]
KEY = "a-key-of-the-test"
NEW = {"id": "fresh", "title": "Arvo", "section": "", "text": "The capital of Arvo is Nova."}
# Serves a store on a port of its own choice, until it is killed.
CHILD = """
import sys
import atlas_jax
from tests.serving.served import CONFIG, SETTINGS
from atlas_jax.serving.run import Server
import dataclasses
model, store = sys.argv[1:]
atlas = atlas_jax.load(model, store=store, **SETTINGS)
config = dataclasses.replace(CONFIG, max_choices=0, max_replaced=0, explain=False)
server = Server(config, atlas.told, lambda: atlas)
print(server.address[1], flush=True)
server.run()
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory, reader_tokenizer_file, retriever_tokenizer_file):
    folder = tmp_path_factory.mktemp("passages")
    load_atlas(folder, reader_tokenizer_file, retriever_tokenizer_file)
    return folder


def test_passages_are_added_replaced_and_deleted(work, monkeypatch):
    monkeypatch.setenv("ATLAS_JAX_API_KEY", KEY)
    told = {"passages": work / "passages.jsonl", "store": work / "store_http"}
    atlas = atlas_jax.load(work / "model", **told, **SETTINGS)
    head = {"authorization": f"Bearer {KEY}"}
    small = {"max_choices": 0, "max_replaced": 0, "explain": False}
    with serving(atlas, **small) as server:
        body = {"passages": [NEW, {"id": "p0", "text": "Gone."}], "delete": ["p1"]}
        assert send(server, "/v1/passages", body).status == 401
        made = send(server, "/v1/passages", body, **head)
        assert made.status == 200, made.body
        assert {k: made.json[k] for k in ("added", "replaced", "deleted")} == {
            "added": 1, "replaced": 1, "deleted": 1,
        }  # fmt: skip
        index = made.json["index"]
        assert (index["passages_version"], index["passages"]) == (1, 16)
        assert send(server, "/v1/passages/fresh", **head).json["text"] == NEW["text"]
        assert send(server, "/v1/passages/p1", **head).status == 404
        answer = send(server, "/v1/answers", {"questions": "What is Arvo?"}, **head).json
        assert answer["answers"][0]["index"] == index
        bad = send(server, "/v1/passages", {"passages": [NEW], "delete": ["nobody"]}, **head)
        assert bad.status == 400 and "no passage with the id 'nobody'" in bad.json["detail"]
        assert bad.headers["content-type"] == "application/problem+json"
        assert send(server, "/v1/passages", {"passages": [{"id": "x"}]}, **head).status == 400
        gone = send(server, "/v1/passages/fresh", method="DELETE", **head)
        assert (gone.status, gone.json["index"]["passages_version"]) == (200, 2)
        assert send(server, "/v1/passages/fresh", method="DELETE", **head).status == 404
        described = send(server, "/openapi.json").json["paths"]
        assert {"get", "delete"} <= set(described["/v1/passages/{id}"])
    assert LivingStore.as_of(work / "store_http", "1").find("fresh") is not None


def test_a_server_without_a_key_changes_nothing(server):
    refused = send(server, "/v1/passages", {"passages": [NEW]})
    assert refused.status == 403 and "no API key" in refused.json["detail"]
    assert send(server, "/v1/passages/p0", method="DELETE").status == 403
    assert ask(server, "What?")[0]["index"]["passages_version"] == 0


@pytest.mark.slow
def test_a_kill_during_changes_loses_nothing_that_was_acknowledged(work):
    store = work / "store_killed"
    atlas_jax.load(work / "model", passages=work / "passages.jsonl", store=store, **SETTINGS)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(work / "model"), str(store)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "ATLAS_JAX_API_KEY": KEY},
    )
    acknowledged: list[str] = []
    try:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        until = time.monotonic() + 240
        while not _ready(port):
            assert child.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        poster = threading.Thread(target=_post_until_it_fails, args=(port, acknowledged))
        poster.start()
        while len(acknowledged) < 4:
            assert poster.is_alive()
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        poster.join(30)
    finally:
        child.kill()
        child.communicate()
    found = LivingStore.as_of(store)
    assert all(found.find(one) is not None for one in acknowledged)
    assert found.version["version"] in (len(acknowledged), len(acknowledged) + 1)
    assert atlas_jax.change_index(store=store, delete=acknowledged[:1]) > len(acknowledged)


def _ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _post_until_it_fails(port: int, acknowledged: list[str]) -> None:
    head = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    for number in range(1000):
        body = json.dumps({"passages": [{**NEW, "id": f"k{number}"}]})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("POST", "/v1/passages", body, head)
            if connection.getresponse().status != 200:
                return
        except (OSError, http.client.HTTPException):
            return
        finally:
            connection.close()
        acknowledged.append(f"k{number}")
