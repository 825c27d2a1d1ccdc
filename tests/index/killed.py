"""Builds a store and its index in several processes, which are killed at random moments.

    python -m tests.index.killed SOURCE FOLDER READER_TOKENIZER RETRIEVER_TOKENIZER COUNT KILLS SEED

It prints a line of JSON for each attempt: what was there before, what was made, how the processes
ended, and how many rows each that came to its end has tokenised and embedded. An attempt ends when
one process is killed: the others then are, too, as whoever starts a run does. The first build is
left alone, in FOLDER/whole; the others are in FOLDER/0, FOLDER/1, ...

Processes are forked off one that has imported everything, so an attempt takes a second.
"""

import json
import os
import random
import signal
import socket
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from flax.core import meta

from atlas_jax.core import meeting
from atlas_jax.core.devices import Devices, use_devices
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.corpus.config import CorpusConfig
from atlas_jax.corpus.embedder import Embedder
from atlas_jax.index import embed, id_buckets, shard_pool
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.store_build import Cut
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import DualEncoder

PAUSE = 0.02  # seconds before a shard or a round of chunks: else most kills would come too late
WINDOW = 4
LOG = "made"
TINY = RetrieverConfig(
    vocab_size=144, hidden_dim=8, num_layers=1, num_heads=2, mlp_dim=8, max_positions=16
)


def work(index: int, count: int, port: int, source: str, folder: Path, files: list[str]) -> None:
    """What one process does: its share of the store, then of the index."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4 // count)  # what is computed depends on the mesh
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index, heartbeat_timeout_seconds=60)
    log = os.open(folder.with_suffix(f".{LOG}"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    meeting.TELL = 60.0
    id_buckets.BUCKET_ROWS, id_buckets._AT_ONCE, embed.WINDOW = 4, 1, WINDOW
    write_shard, batches = shard_pool.write_shard, embed._batches
    rows = Counter[str]()

    def writing(objects: Any, name: str, records: Any, *rest: Any) -> Any:
        time.sleep(PAUSE)
        os.write(log, f"{name}\n".encode())
        rows["tokenised"] += len(records)
        return write_shard(objects, name, records, *rest)

    def batching(tokens: Any, chunks: Any, *rest: Any) -> Any:
        time.sleep(PAUSE)
        os.write(log, f"round {chunks[0][0] // (chunks[0][1] - chunks[0][0])}\n".encode())
        for rows_b, *others in batches(tokens, chunks, *rest):
            rows["embedded"] += int((rows_b >= 0).sum())
            yield rows_b, *others

    shard_pool.write_shard, embed._batches = writing, batching
    reader, retriever = (Tokenizer.from_file(file) for file in files)
    formats = StoreConfig(reader_length=30, retriever_length=16)
    store = PassageStore.build(
        source, folder / "store", reader, retriever, formats, progress=False, cut=Cut(400, 7, 1)
    )
    if not (folder / "index" / "index.json").exists():
        with use_devices(Devices(MeshConfig(data=-1))) as (mesh, rules):
            model = DualEncoder(TINY)
            tokens = store.retriever_tokens_nm[:1]
            made = jax.jit(model.init)(jax.random.key(0), tokens, tokens)
            params = jax.device_get(meta.unbox(made)["params"])
            told = CorpusConfig(embed_batch_size=4)
            embedder = Embedder(model, retriever, told, mesh, rules)
            embedder.to_directory(params, store, folder / "index", dtype="float32")
    os.write(log, f"rows {rows['tokenised']} {rows['embedded']}\n".encode())
    jax.distributed.shutdown()


def begin(count: int, *rest: Any) -> list[int]:
    """Fork the processes of an attempt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for index in range(count):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                work(index, count, port, *rest)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def there(folder: Path) -> dict[str, list[Any]]:
    """The shards that have their mark, and the chunks that are whole."""
    marks = (folder / "store" / "unfinished" / "done").glob("*.json")
    chunks = (folder / "index").glob("embeddings-*/rows/c/*/0")
    return {
        "shards": sorted(mark.stem for mark in marks),
        "chunks": sorted(int(chunk.parent.name) for chunk in chunks),
        "whole": [(folder / "store" / "manifest.json").exists()],
    }


def attempt(
    count: int, kill: tuple[int, int, float] | None, source: str, folder: Path, files: list[str]
) -> dict[str, Any]:
    """One attempt, and what it was like.

    Args:
      kill: a process, after how many shards and rounds of all of them, and how many seconds later.
    """
    log = folder.with_suffix(f".{LOG}")
    log.write_text("")
    folder.mkdir(exist_ok=True)
    before, started = there(folder), time.monotonic()
    pids = begin(count, source, folder, files)
    running, codes = list(pids), []
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            running.remove(pid)
            codes.append(os.waitstatus_to_exitcode(status))
        if kill and len(log.read_text().splitlines()) >= kill[1]:
            time.sleep(kill[2])
            if pids[kill[0]] in running:
                os.kill(pids[kill[0]], signal.SIGKILL)
            kill = None
        if any(codes):
            for other in running:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.002)
    return {
        "folder": folder.name, "before": before, "made": log.read_text().splitlines(),
        "codes": codes, "seconds": time.monotonic() - started,
    }  # fmt: skip


def main() -> None:
    """Build once undisturbed, then again and again until enough processes were killed."""
    source, folder, *files = sys.argv[1:5]
    count, kills, seed = map(int, sys.argv[5:])
    warnings.simplefilter("ignore")  # of forks
    rng, top = random.Random(seed), Path(folder)
    whole = attempt(count, None, source, top / "whole", files)
    print(json.dumps(whole), flush=True)
    done = build = 0
    while done < kills:
        kill = rng.randrange(count), rng.randrange(len(whole["made"])), rng.uniform(0.0, 0.2)
        told = attempt(count, kill, source, top / str(build), files)
        print(json.dumps(told), flush=True)
        done += any(told["codes"])
        build += not any(told["codes"])
    print(json.dumps(attempt(count, None, source, top / str(build), files)), flush=True)


if __name__ == "__main__":
    main()
