"""A small model and a server of it in a thread, and a client that says what it sends."""

import contextlib
import dataclasses
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import atlas_jax
from atlas_jax import from_gin
from atlas_jax.answering.atlas import Atlas
from atlas_jax.answering.batcher import DataConfig
from atlas_jax.core.config import load_gin
from atlas_jax.core.devices import use_devices
from atlas_jax.corpus.config import ReadConfig
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.assembly import assemble, export_model
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.serving.config import ServeConfig
from atlas_jax.serving.run import Server
from tests.training.runs import write_run

SETTINGS: dict[str, Any] = {
    "read": ReadConfig(k=3, reader_length=96),
    "data": DataConfig(query_length=48, retriever_query_length=32, target_length=8),
    "formats": StoreConfig(reader_length=40, retriever_length=40),
    "generation": GenerationConfig(max_length=4),
}
CONFIG = ServeConfig(
    port=0, ks=(4,), batch_rows=(1,), max_choices=2, max_excluded=4, max_replaced=2,
    max_questions=4, queue=40, max_characters=200, max_text=1000, max_body=8192,
    deadline_seconds=20.0, body_seconds=1.0,
)  # fmt: skip


def load_atlas(folder: Path, reader_tokenizer: Path, retriever_tokenizer: Path) -> Atlas:
    """A small model with its corpus of 16 passages."""
    load_gin([str(write_run(folder, reader_tokenizer, retriever_tokenizer))])
    with use_devices(from_gin.devices()) as (mesh, rules):
        made = assemble(from_gin.models(), mesh, rules)
        export_model(folder / "model", made.models, made.params, made.tokenizers, "float32", {})
    return atlas_jax.load(folder / "model", passages=folder / "passages.jsonl", **SETTINGS)


def kept_store(folder: Path, reader_tokenizer: Path, retriever_tokenizer: Path) -> None:
    """A small model with a store and an index that is saved."""
    load_atlas(folder, reader_tokenizer, retriever_tokenizer)
    told = {"passages": folder / "passages.jsonl", "store": folder / "store"}
    formats = SETTINGS["formats"]
    atlas_jax.build_index(folder / "model", **told, index=folder / "index", formats=formats)


def load_kept(folder: Path, **more: Any) -> Atlas:
    """The model of `kept_store`."""
    told = {"store": folder / "store", "index": folder / "index", **more}
    return atlas_jax.load(folder / "model", **told, **SETTINGS)


@contextlib.contextmanager
def serving(atlas: Atlas, **settings: Any) -> Iterator[Server]:
    """A server of this model, ready, in a thread."""
    config = dataclasses.replace(CONFIG, **settings)
    server = Server(config, atlas.told, lambda: atlas)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 300
        while not server.service.is_ready:
            assert thread.is_alive() and time.monotonic() < until, server.service.state
            time.sleep(0.02)
        yield server
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


@dataclasses.dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def send(server: Server, path: str, body: Any = None, method: str = "", **headers: str) -> Reply:
    """One request; a body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.address[1], timeout=30)
    raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    if raw is not None:
        told = {"content-type": "application/json", **told}
    try:
        connection.request(method or ("GET" if raw is None else "POST"), path, raw, told)
        answer = connection.getresponse()
        names = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, names, answer.read())
    finally:
        connection.close()


def ask(server: Server, questions: Any, **fields: Any) -> Any:
    """The answers to questions; they have to come."""
    reply = send(server, "/v1/answers", {"questions": questions, **fields})
    assert reply.status == 200, reply.body
    return reply.json["answers"]
