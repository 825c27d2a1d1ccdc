"""Two processes change an index together, and find what one finds in an index made from nothing."""

import json
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import atlas_jax
from tests.test_face import QUESTIONS, SETTINGS, work  # noqa: F401  (a fixture)
from tests.training.runs import read_lines, write_lines
from tests.training.test_processes import ROOT, finish

# Two devices each. A machine that stops its jobs for minutes shall not look like a dead process.
COMMANDS = """
import functools, json, sys
import jax
jax.distributed.initialize = functools.partial(
    jax.distributed.initialize, heartbeat_timeout_seconds=3600
)
from atlas_jax import cli, from_gin, retrieve  # before gin is locked by the first command
job, flags = json.loads(sys.argv[1]), sys.argv[2:]
for arguments in job["commands"]:
    code = cli.main([*arguments, *flags])
    assert code == job["code"], (arguments, code)
"""
# Then a model answers in one thread while another one changes its passages.
HOT = """
import threading, time
import atlas_jax
from tests.test_face import QUESTIONS, SETTINGS
from tests.test_living_atlas import compiled
atlas = atlas_jax.load(**job["load"], **SETTINGS)
pair = [{"id": f"half{i}", "title": "T", "text": "edition 0"} for i in range(2)]
atlas.add_passages(pair)
count, seen = atlas.store.count, []
def read():
    for _ in range(24):
        found = {one.id: one.text for one in atlas.retrieve(QUESTIONS[0], k=count)}
        seen.append(sorted({found["half0"], found["half1"]}))
thread = threading.Thread(target=read)
atlas.retrieve(QUESTIONS[0], k=count)
thread.start()
for edition in range(1, 7):
    while len(seen) < 3 * edition and thread.is_alive():  # in one process sooner than in the other
        time.sleep(0.01)
    atlas.replace_passages([{**one, "text": f"edition {edition}"} for one in pair])
thread.join()
for batch in job["batches"]:
    atlas.change_passages(**batch)
    if atlas.store.count > 400:
        atlas._changes.growth.wait()
atlas.delete_passages(["half1"])
for number in range(4):
    last = [f"again{number - 1}"] if number else []
    atlas.change_passages(add=[{**pair[0], "id": f"again{number}"}], delete=last)
    atlas.retrieve(QUESTIONS, k=5)
    if number == 1:  # what adds and deletes one is compiled by now
        events = compiled()
late = list(events)
atlas.delete_passages(["again3"])
found = [[(one.id, one.text, one.score) for one in each]
         for each in atlas.retrieve(QUESTIONS, k=atlas.store.count)]
told = {"seen": seen, "capacity": atlas._corpus.capacity, "found": found,
        "version": atlas.passages_version, "compiled": late}
print("told " + json.dumps(told), flush=True)
"""


def begin(child: str, job: dict[str, Any], count: int = 2) -> list[subprocess.Popen[str]]:
    """Start the processes of a child that does a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = [f"--coordinator_address=127.0.0.1:{port}", f"--process_count={count}"]
    return [
        subprocess.Popen(
            [sys.executable, "-c", child, json.dumps(job), *hosts, f"--process_index={index}"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
        )
        for index in range(count)
    ]  # fmt: skip


def passage(passage_id: str, words: str) -> dict[str, str]:
    return {"id": passage_id, "title": "T", "section": "", "text": words}


def found_alike(work: Path, held: dict[str, Any], found: list[list[Any]]) -> None:  # noqa: F811
    """Each question's (id, text, score) are those of an index made from nothing."""
    anew = write_lines(work / "anew.jsonl", list(held.values()))
    atlas = atlas_jax.load(work / "model", passages=anew, **SETTINGS)
    for rows, passages in zip(found, atlas.retrieve(QUESTIONS, k=len(held)), strict=True):
        expected = {one.id: one for one in passages}
        assert {row[0]: row[1] for row in rows} == {one.id: one.text for one in passages}
        for passage_id, _, score in rows:
            assert score == pytest.approx(expected[passage_id].score, abs=1e-4)


@pytest.mark.slow
def test_two_processes_change_and_find_what_one_finds_in_an_index_from_nothing(
    work: Path,  # noqa: F811
) -> None:
    drawn, model, file = random.Random(3), work / "model", work / "passages.jsonl"
    store, index = work / "together_store", work / "together_index"
    atlas_jax.build_index(
        model, passages=file, store=store, index=index, formats=SETTINGS["formats"]
    )
    places = [f"--store={store}", f"--index={index}"]
    with_model, held = [f"--model={model}", *places], {row["id"]: row for row in read_lines(file)}
    commands, states = list[list[str]](), list[dict[str, Any]]()
    for number in range(1, 8):
        some = drawn.sample(sorted(held), 2)
        new = [passage(f"n{number}{i}", f"the capital {number} {i}") for i in range(3)]
        other = passage(some[0], f"people of {number}")
        what = ("add", "replace", "delete", "compact", "add", "replace", "delete")[number - 1]
        if what == "compact":
            commands.append(["index", what, *places, "--keep=2"])
        elif what == "delete":
            commands.append(["index", what, *some, f"--store={store}"])
            held = {k: v for k, v in held.items() if k not in some}
        else:
            brought = new if what == "add" else [other]
            lines = write_lines(work / f"{number}.jsonl", brought)
            commands.append(["index", what, str(lines), *with_model])
            held = {**held, **{one["id"]: one for one in brought}}
        states.append(held)
    for version in (3, 7):  # as the segment that was compacted, and the newest one
        bound = {
            "ModelConfig.retriever": f"'{model}'", "ModelConfig.retriever_tokenizer": "''",
            "CorpusConfig.store": f"'{store}'", "CorpusConfig.index": f"'{index}'",
            "RetrieveConfig.file": f"'{work}/train.jsonl'", "RetrieveConfig.batch_size": 4,
            "RetrieveConfig.k": len(states[version - 1]),
            "RetrieveConfig.output": f"'{work}/found{version}.jsonl'",
            "MeshConfig.data": 2, "MeshConfig.fsdp": 2,
        }  # fmt: skip
        flags = [f"--gin.{name}={value}" for name, value in bound.items()]
        run = f"--gin_file={work / 'run.gin'}"
        commands.append(["retrieve", run, f"--as_of={version}", *flags])
    many = [passage(f"m{i}", f"text {i % 7}") for i in range(455)]
    batches: list[dict[str, Any]] = [
        {"add": [passage("late", "late")], "delete": ["half0"]},
        {"add": many},  # of 512 rows nine tenths are in use
        {"delete": [f"m{i}" for i in range(0, 455, 3)], "replace": [passage("late", "later")]},
    ]
    load = {"model": str(model), "store": str(store), "index": str(index)}
    job = {"commands": commands, "code": 0, "load": load, "batches": batches}
    outputs = finish(begin(COMMANDS + HOT, job))
    assert re.search(r"version 7, \S+: 18 passages", outputs[0]) and "version 7" not in outputs[1]
    for version in (3, 7):
        rows = read_lines(work / f"found{version}.jsonl")[:2]  # QUESTIONS are the first two
        told = [[(p["id"], p["text"], p["score"]) for p in row["passages"]] for row in rows]
        found_alike(work, states[version - 1], told)

    hot = [json.loads("{" + out.split("told {", 1)[1].splitlines()[0]) for out in outputs]
    # The devices of both see the same version at the same step, and never half of one.
    assert hot[0] == hot[1] and all(len(texts) == 1 for texts in hot[0]["seen"])
    assert len({texts[0] for texts in hot[0]["seen"]}) > 1
    assert "of 512 rows on the devices are in use" in outputs[0]
    assert hot[0]["capacity"] == 1024 and hot[0]["version"] == 23
    assert hot[0]["compiled"] == []
    for batch in batches:
        held = {k: v for k, v in held.items() if k not in batch.get("delete", ())}
        held |= {one["id"]: one for one in (*batch.get("add", ()), *batch.get("replace", ()))}
    found_alike(work, held, hot[0]["found"])


@pytest.mark.slow
def test_a_process_with_another_file_changes_nothing(work: Path) -> None:  # noqa: F811
    store, index = work / "fault_store", work / "fault_index"
    told = {"store": store, "index": index}
    file, formats = work / "passages.jsonl", SETTINGS["formats"]
    atlas_jax.build_index(work / "model", passages=file, formats=formats, **told)
    flags = [f"--model={work / 'model'}", f"--store={store}", f"--index={index}"]
    for process, text in enumerate(["one", "two"]):
        write_lines(work / f"mine{process}.jsonl", [passage("a", text)])
    job = {"commands": [["index", "add", f"{work}/mine#.jsonl", *flags]], "code": 2}
    child = COMMANDS.replace("sys.argv[1]", "sys.argv[1].replace('#', sys.argv[-1][-1])")
    for out in finish(begin(child, job)):
        assert "process 1 of 2 was given other changes than process 0" in out
    assert not (store / "segments").exists() and not (store / "versions" / ".lock").exists()
    assert not (index / "embeddings-of-segments").exists()
