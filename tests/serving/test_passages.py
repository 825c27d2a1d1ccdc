"""Passages changed over HTTP: one version a batch, seen by the next question."""

import pytest

import atlas_jax
from atlas_jax.index.living import LivingStore
from tests.serving.served import SETTINGS, ask, load_atlas, send, serving

KEY = "a-key-of-the-test"
NEW = {"id": "fresh", "title": "Arvo", "section": "", "text": "The capital of Arvo is Nova."}


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
