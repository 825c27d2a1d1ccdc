"""`atlas-jax serve` as a process: what it refuses, and how it ends."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from atlas_jax import serve
from atlas_jax.answering.atlas import Atlas
from atlas_jax.serving.config import ServeConfig
from atlas_jax.serving.run import Server
from tests.serving.served import SETTINGS, send

TOLD = ["--gin_file=runs/serve.gin", "--gin.INITIAL_CHECKPOINT_PATH=x/y", "--gin.STORE=x/z"]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert serve.main(TOLD) == 2
    assert "needs the package uvicorn: pip install 'atlas-jax[serve]'" in capsys.readouterr().err


def test_an_address_that_is_taken_is_named(atlas: Atlas, server: Server) -> None:
    config = ServeConfig(port=server.address[1])
    with pytest.raises(ValueError, match="Address already in use; choose another"):
        Server(config, atlas.told)


@pytest.mark.slow
def test_sigterm_ends_it_after_what_it_took_was_answered(atlas: Atlas) -> None:
    told = atlas.told
    bindings = {
        "INITIAL_CHECKPOINT_PATH": told.models.config.reader,
        "STORE": told.corpus.config.store,
        "PORT": 0,
        "TEXT_LENGTH": told.read.reader_length,
        "PASSAGE_LENGTH": told.corpus.formats.reader_length,
        "StoreConfig.retriever_length": told.corpus.formats.retriever_length,
        **{f"DataConfig.{n}": v for n, v in dataclasses.asdict(SETTINGS["data"]).items()
           if n.endswith("_length") and v},
        "GenerationConfig.max_length": 4,
        "ServeConfig.ks": (2,),
        "ServeConfig.batch_rows": (1,),
        "ServeConfig.explain": False,
        "ServeConfig.max_replaced": 0,
    }  # fmt: skip
    command = [sys.executable, "-m", "atlas_jax", "serve", "--gin_file=runs/serve.gin"]
    command += [f"--gin.{name}={value!r}" for name, value in bindings.items()]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    ) as process:
        assert process.stderr is not None
        lines: list[dict] = []
        for line in process.stderr:
            lines += [json.loads(line)] if line.startswith("{") else []
            if lines and lines[-1]["event"] == "ready":
                break
        port = int(lines[0]["url"].rpartition(":")[2])
        there = SimpleNamespace(address=("127.0.0.1", port))
        held = subprocess.Popen(  # a client whose body is not complete when the signal comes
            [sys.executable, "-c", _SLOW_CLIENT, str(port)], stdout=subprocess.PIPE, text=True
        )
        assert held.stdout is not None and held.stdout.readline() == "half\n"
        assert send(there, "/readyz").status == 200  # type: ignore[arg-type]
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        answer, _ = held.communicate(timeout=30)
        assert json.loads(answer)["answers"][0]["passages"]
        assert process.wait(30) == 0
        events = [json.loads(line) for line in process.stderr if line.startswith("{")]
    assert [one["event"] for one in events] == ["request", "stopped"]
    assert events[0]["status"] == 200 and "texts" not in events[0]


_SLOW_CLIENT = """
import http.client, json, sys, time
body = json.dumps({"questions": "What is the capital of Arvo?"}).encode()
client = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=30)
client.putrequest("POST", "/v1/answers")
client.putheader("content-type", "application/json")
client.putheader("content-length", str(len(body)))
client.endheaders()
client.send(body[:10])
time.sleep(0.3)
print("half", flush=True)
time.sleep(1)
client.send(body[10:])
print(client.getresponse().read().decode())
"""
