"""What a passage store costs: processor time of each stage, memory and bytes.

    python -m benchmarks.stores --passages=psgs.jsonl [--count=100000] [--model=FOLDER]

The passages of a file, as often as needed with new ids, become a store in one process, with the
tokenizers of a model. Bytes are those of the finished store.
"""

import argparse
import itertools
import json
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import atlas_jax
from atlas_jax.core.file_sets import read_passages
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index import corpus_parts, shard_writer, store_build
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.store_files import StoreConfig

NANO = Path(atlas_jax.__file__).parent / "checkpoints" / "nano"
LENGTH = 448


def corpus(source: str, target: Path, count: int) -> None:
    """Write so many passages with ids of their own."""
    some = [record for _, record in read_passages(source)]
    with target.open("w", encoding="utf-8") as file:
        for number, record in enumerate(itertools.islice(itertools.cycle(some), count)):
            file.write(json.dumps({**record, "id": f"{number}"}, ensure_ascii=False) + "\n")


def timed(seconds: Counter[str], stage: str, owner: Any, name: str) -> None:
    """Count a function's processor time, all threads, as a stage's."""
    plain: Callable[..., Any] = getattr(owner, name)

    def call(*given: Any, **named: Any) -> Any:
        start = time.process_time()
        try:
            return plain(*given, **named)
        finally:
            seconds[stage] += time.process_time() - start

    setattr(owner, name, call)


def timed_records(seconds: Counter[str]) -> None:
    """Count the time in which records are read."""
    plain = corpus_parts.Unit.records

    def records(unit: corpus_parts.Unit, *given: Any) -> Iterator[Any]:
        rows = plain(unit, *given)
        while True:
            start = time.process_time()
            row = next(rows, None)
            seconds["read and check"] += time.process_time() - start
            if row is None:
                return
            yield row

    corpus_parts.Unit.records = records  # type: ignore[method-assign]


def measure(source: str, count: int, model: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Processor seconds of the stages, and other figures."""
    seconds: Counter[str] = Counter()
    timed_records(seconds)
    timed(seconds, "tokenise", shard_writer, "_tokenised")
    timed(seconds, "write shards", shard_writer, "write_rows")
    timed(seconds, "merge ids", store_build, "make_round")
    tokenizers = [
        Tokenizer.from_file(model / f"{tower}_tokenizer.json") for tower in ("reader", "retriever")
    ]
    with tempfile.TemporaryDirectory() as name:
        passages, folder = Path(name) / "passages.jsonl", Path(name) / "store"
        corpus(source, passages, count)
        before, start = time.process_time(), time.monotonic()
        config = StoreConfig(reader_length=LENGTH, retriever_length=LENGTH)
        cut = store_build.Cut(workers=1)
        store = PassageStore.build(passages, folder, *tokenizers, config, cut=cut)
        told = {
            "all, processor seconds": time.process_time() - before,
            "all, seconds": time.monotonic() - start,
            "peak memory, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "text, bytes a passage": size(folder, "*/text.jsonl") / count,
            "reader tokens, bytes a passage": size(folder, "*/reader/c/*") / count,
            "retriever tokens, bytes a passage": size(folder, "*/retriever/c/*") / count,
            "all files, bytes a passage": size(folder.parent, "store/**/*") / count,
            "shards": float(len(store.manifest["shards"])),
        }
    return dict(seconds), told


def size(folder: Path, pattern: str) -> int:
    """Bytes of the files of a pattern, below the shards or the folder itself."""
    top = folder / "shards" if (folder / "shards").exists() else folder
    return sum(path.stat().st_size for path in top.glob(pattern) if path.is_file())


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--passages", required=True)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--model", type=Path, default=NANO)
    flags = parser.parse_args()
    stages, told = measure(flags.passages, flags.count, flags.model)
    table = Table("", f"{flags.count:,} passages", "a million")
    for name, spent in stages.items():
        table.add_row(
            f"{name}, processor seconds", f"{spent:.1f}", f"{spent / flags.count * 1e6:.0f}"
        )
    for name, figure in told.items():
        table.add_row(name, f"{figure:,.1f}", "")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
