"""A store built by several processes: the same bytes as by one, divided work, kills, faults."""

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.index.test_shards import content, records, write

ROOT = Path(__file__).parents[2]
# Arguments: process, processes, port, passages, store, both tokenizers, and the shard at which this
# process ends (-1: none). It prints the names of the shards that it made.
CHILD = """
import os, signal, sys
import jax
from atlas_jax.core import meeting
from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index import id_buckets, shard_pool
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.store_build import Cut
from atlas_jax.index.store_files import StoreConfig
index, count, port, source, folder, reader, retriever, ends = sys.argv[1:]
if int(count) > 1:
    jax.distributed.initialize(
        f"127.0.0.1:{port}", int(count), int(index), heartbeat_timeout_seconds=20
    )
meeting.TELL = 0.5
id_buckets.BUCKET_ROWS, id_buckets._AT_ONCE = 4, 1
made, plain = [], shard_pool.write_shard
def write(objects, name, *rest):
    if len(made) == int(ends):
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(name)
    return plain(objects, name, *rest)
shard_pool.write_shard = write
towers = [Tokenizer.from_file(name) for name in (reader, retriever)]
config = StoreConfig(reader_length=30, retriever_length=16)
try:
    PassageStore.build(
        source, folder, *towers, config, progress=False, cut=Cut(400, 7, 1)
    )
    print("made", *made, flush=True)
except UserError as error:
    print("refused:", error, flush=True)
"""


def start(count, source, folder, tokenizers, ends=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-c", CHILD, str(index), str(count), str(port)),
                *map(str, (source, folder, *tokenizers, (ends or {}).get(index, -1))),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for index in range(count)
    ]


def finish(processes):
    """What each prints on stdout and on stderr; a process still running after a minute fails."""
    try:
        return [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()


def made(outputs):
    for out, err in outputs:
        assert out.startswith("made"), (out, err)
    return [out.split()[1:] for out, _ in outputs]


@pytest.fixture
def tokenizers(reader_tokenizer_file, retriever_tokenizer_file):
    return reader_tokenizer_file, retriever_tokenizer_file


@pytest.fixture(scope="module", params=["ranges", "table", "files"])
def source(request, tmp_path_factory):
    """A file that is cut into ranges; one that all processes read; files that are divided."""
    folder, rows = tmp_path_factory.mktemp(request.param), records(70)
    if request.param == "ranges":
        return write(folder / "p.jsonl", rows)
    if request.param == "table":
        names = ("id", "text", "title")
        lines = [names, *([one[name] for name in names] for one in rows)]
        (folder / "p.tsv").write_text("\n".join("\t".join(line) for line in lines))
        return folder / "p.tsv"
    for number in range(10):
        write(folder / f"{number}.txt.jsonl", rows[number * 7 : number * 7 + 7])
    return folder


@pytest.mark.slow
def test_two_and_four_processes_write_the_bytes_of_one(source, tmp_path, tokenizers):
    (alone,) = made(finish(start(1, source, tmp_path / "1", tokenizers)))
    for count in (2, 4) if source.suffix == ".jsonl" else (3,):
        shares = made(finish(start(count, source, tmp_path / str(count), tokenizers)))
        assert content(tmp_path / str(count)) == content(tmp_path / "1")
        assert sorted(sum(shares, [])) == sorted(alone)  # each shard is made once
        assert max(map(len, shares)) <= min(map(len, shares)) + 1


@pytest.mark.slow
def test_a_process_is_missed_by_its_number_and_its_shards_are_made_later(tmp_path, tokenizers):
    source = write(tmp_path / "p.jsonl", records(70))
    whole = made(finish(start(2, source, tmp_path / "whole", tokenizers)))
    rng = random.Random(0)
    ends = {1: rng.randrange(1, len(whole[1]))}
    processes = start(2, source, tmp_path / "store", tokenizers, ends)
    try:
        assert processes[1].wait(timeout=60) == -signal.SIGKILL
        line = processes[0].stderr.readline()
        while "waiting for" not in line:
            assert line, "process 0 ended"
            line = processes[0].stderr.readline()
        assert f"waiting for process 1 ({ends[1]} shards made) of 2 for" in line
        done = sorted(path.stem for path in (tmp_path / "store" / "unfinished/done").iterdir())
        assert len(done) == len(whole[0]) + ends[1]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    again = made(finish(start(4, source, tmp_path / "store", tokenizers)))  # of more processes
    assert sorted([*done, *sum(again, [])]) == sorted(sum(whole, []))
    assert content(tmp_path / "store") == content(tmp_path / "whole")


@pytest.mark.slow
def test_all_processes_end_with_the_fault_that_one_has_found(tmp_path, tokenizers):
    rows = records(70)
    rows[60]["text"] = ""
    source = write(tmp_path / "p.jsonl", rows)
    outputs = finish(start(2, source, tmp_path / "store", tokenizers))
    for out, err in outputs:
        assert "refused:" in out and "p.jsonl:61: field 'text' is empty" in out, err
    assert not (tmp_path / "store").exists()
    rows[60] = {**rows[60], "text": "x", "id": "p0"}
    outputs = finish(start(2, write(source, rows), tmp_path / "store", tokenizers))
    for out, err in outputs:
        assert "duplicate passage id 'p0'" in out and "p.jsonl:61" in out, err
