"""One process's share of a store and its index, measured; `benchmarks.stores` starts it.

    python -m benchmarks.stores_worker INDEX COUNT PORT PASSAGES FOLDER MODEL store|index

It prints processor seconds by stage, all threads, and the peak of memory, as one line of JSON.
"""

import json
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from atlas_jax.core.devices import Devices, use_devices
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.corpus.config import CorpusConfig
from atlas_jax.corpus.embedder import Embedder
from atlas_jax.index import corpus_parts, embed, shard_writer, store_build
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.assembly import load_retriever
from atlas_jax.models.config import ModelConfig, ModelSpec

LENGTH, RETRIEVER_LENGTH = 448, 128  # tokens kept; the nano retriever takes no more
PART_BYTES = 1 << 20  # of a shard: as many of them as a large corpus has of the usual size
PARTS = 4  # of a batch: devices of all processes


def timed(seconds: dict[str, float], stage: str, owner: Any, name: str) -> None:
    """Count a function's processor time, all threads, as a stage's."""
    plain: Callable[..., Any] = getattr(owner, name)

    def call(*given: Any, **named: Any) -> Any:
        start = time.process_time()
        try:
            return plain(*given, **named)
        finally:
            seconds[stage] += time.process_time() - start

    setattr(owner, name, call)


def timed_records(seconds: dict[str, float], counts: Counter[str]) -> None:
    """Count the time in which records are read, and the records."""
    plain = corpus_parts.Unit.records

    def records(unit: corpus_parts.Unit, *given: Any) -> Iterator[Any]:
        rows = plain(unit, *given)
        while True:
            start = time.process_time()
            row = next(rows, None)
            seconds["read and check"] += time.process_time() - start
            if row is None:
                return
            counts["passages read"] += 1
            yield row

    corpus_parts.Unit.records = records  # type: ignore


def counted_rows(counts: Counter[str]) -> None:
    """Count the rows that this process embeds."""
    plain = embed._batches

    def batches(*given: Any) -> Iterator[Any]:
        for rows_b, *rest in plain(*given):
            counts["passages embedded"] += int((rows_b >= 0).sum())
            yield rows_b, *rest

    embed._batches = batches  # type: ignore[assignment]


def peak() -> float:
    """The most memory that this process has held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make(source: str, folder: Path, model: str, last: str) -> dict[str, float]:
    """Make this process's share of the store, and of the index if it is the last; all figures."""
    seconds, counts = defaultdict[str, float](float), Counter[str]()
    timed_records(seconds, counts)
    timed(seconds, "tokenise", shard_writer, "_tokenised")
    timed(seconds, "write shards", shard_writer, "write_rows")
    timed(seconds, "merge ids", store_build, "make_round")
    counted_rows(counts)
    reader = Tokenizer.from_file(Path(model) / "reader_tokenizer.json")
    retriever = Tokenizer.from_file(Path(model) / "retriever_tokenizer.json")
    config = StoreConfig(reader_length=LENGTH, retriever_length=RETRIEVER_LENGTH)
    before = time.process_time()
    cut = store_build.Cut(PART_BYTES, workers=1)
    store = PassageStore.build(
        source, folder / "store", reader, retriever, config, progress=False, cut=cut
    )
    told = {"store, all": time.process_time() - before, "store, peak memory, MiB": peak()}
    if last == "store":
        return {**counts, **seconds, **told}
    before = time.process_time()
    with use_devices(Devices(MeshConfig(data=-1))) as (mesh, rules):
        loaded, params, tokenizer = load_retriever(ModelSpec(ModelConfig(retriever=model)))
        given = CorpusConfig(embed_batch_size=64 * PARTS)
        embedder = Embedder(loaded, tokenizer, given, mesh, rules)
        embedder.to_directory(jax.device_get(params), store, folder / "index", dtype="int8")
    told |= {"embed, all": time.process_time() - before, "index, peak memory, MiB": peak()}
    return {**counts, **seconds, **told}


def main() -> None:
    """Join the others, make the share, print the figures."""
    index, count, port = map(int, sys.argv[1:4])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", PARTS // count)
    if count > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{port}", count, index, heartbeat_timeout_seconds=3600
        )
    source, folder, model, last = sys.argv[4:]
    print(json.dumps(make(source, Path(folder), model, last)), flush=True)
    if count > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
