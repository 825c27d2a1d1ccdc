"""One way of `benchmarks.search` in a process of its own: build it, or load it and search.

    python -m benchmarks.search_worker build|search WAY FOLDER

`build` writes FOLDER/WAY.json with seconds, peak memory and bytes on the disk. `search` prints one
line of json: the memory, and for each aim the cheapest setting that reaches it. Then it searches
all queries for each aim's number that it reads, and prints the seconds.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.int8_recall import recall
from benchmarks.search_ways import WAYS, Loaded

AIMS = (0.95, 0.99)  # recall@10
BATCH = 64  # queries searched at once
TUNED_ON = 256  # the first queries; the others are timed
VECTORS, QUERIES, TRUTH = "vectors.npy", "queries.npy", "truth.npy"
MIB = 2**20


def build(way: str, folder: Path) -> None:
    """Build and tell what it took."""
    place = folder / way
    place.mkdir()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    WAYS[way].build(folder / VECTORS, place)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    size = sum(file.stat().st_size for file in place.iterdir())
    told = {"build_seconds": seconds, "build_mib": peak / 1024, "disk_mib": size / MIB}
    (folder / f"{way}.json").write_text(json.dumps(told))


def batches(queries: np.ndarray) -> Iterator[np.ndarray]:
    """Whole batches of queries; what is left over is not searched."""
    for start in range(0, len(queries) // BATCH * BATCH, BATCH):
        yield queries[start : start + BATCH]


def found(loaded: Loaded, queries: np.ndarray, setting: Any) -> tuple[np.ndarray, float]:
    """The rows found, and the seconds that it took."""
    start = time.perf_counter()
    rows = [loaded[0](batch, setting) for batch in batches(queries)]
    return np.concatenate(rows), time.perf_counter() - start


def tuned(loaded: Loaded, queries: np.ndarray, truth: np.ndarray) -> list[Any]:
    """For each aim the setting that reaches it in the least time; None if none does."""
    tried = []
    for setting in loaded[1]:
        loaded[0](queries[:BATCH], setting)  # compiles
        rows, seconds = found(loaded, queries, setting)
        tried.append((seconds, recall(rows, truth[: len(rows)]), setting))
    chosen = []
    for aim in AIMS:
        good = [one for one in tried if one[1] >= aim]
        chosen.append(min(good, key=lambda one: one[0])[2:] if good else None)
    return chosen


def _held(process: psutil.Process) -> int:
    """Bytes of memory without the pages of mapped files, which the system takes back at need."""
    told = process.memory_info()
    return int(told.rss - told.shared)


def search(way: str, folder: Path) -> None:
    """Serve timed searches until standard input ends."""
    process = psutil.Process()
    before = _held(process)
    loaded = WAYS[way].load(folder / VECTORS, folder / way)
    queries, truth = np.load(folder / QUERIES), np.load(folder / TRUTH)
    chosen = tuned(loaded, queries[:TUNED_ON], truth[:TUNED_ON])
    timed, expected = queries[TUNED_ON:], truth[TUNED_ON:]
    told: list[dict[str, Any] | None] = []
    for setting in chosen:
        if setting is None:
            told.append(None)
            continue
        rows, _ = found(loaded, timed, setting[0])
        told.append({"setting": setting[0], "recall": recall(rows, expected[: len(rows)])})
    grown = (_held(process) - before) / MIB
    count = len(timed) // BATCH * BATCH
    print(json.dumps({"memory_mib": grown, "queries": count, "aims": told}), flush=True)
    for line in sys.stdin:
        setting = chosen[int(line)]
        assert setting is not None
        print(found(loaded, timed, setting[0])[1], flush=True)


if __name__ == "__main__":
    {"build": build, "search": search}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
