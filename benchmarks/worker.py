"""One side of one workload in a process of its own: warm up, then one timed run per line read.

Started by ``benchmarks.run``. Where there are several ways to do the work, all are tried and the
fastest is kept. Prints the ways and their seconds in json, the one that is kept first, then one
time in seconds per line of standard input, and at its end the process's peak memory in MiB.
"""

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable

from benchmarks.real_text import CORPORA, READ
from benchmarks.workloads import Sizes, Ways, sizes_of

REAL = tuple(f"{what}_{corpus}" for corpus in CORPORA for what in (*READ, "embed"))
WORKLOADS = ("train_step", "generate", "embed", "search_8", "search_100", *REAL)
WARM_UP_RUNS = 2


TRIALS = 3  # of each way, where there are several


def build(side: str, workload: str, sizes: Sizes) -> Ways:
    """The functions that do the work, from ``benchmarks.ours`` or ``benchmarks.alternatives``."""
    module = importlib.import_module(f"benchmarks.{side}")
    if workload in REAL:
        what, _, corpus = workload.partition("_")
        return {"": getattr(module, f"real_{what}")(sizes, corpus)}
    name, _, k = workload.partition("search_")
    return module.search(sizes, int(k)) if k else {"": getattr(module, name)(sizes)}


def tried(ways: Ways) -> dict[str, float]:
    """The seconds of each way, the fastest first: its best of a few trials."""
    best = {name: min(seconds(run) for _ in range(TRIALS)) for name, run in ways.items()}
    return dict(sorted(best.items(), key=lambda one: one[1]))


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Serve timed runs until standard input ends."""
    side, workload, *changes = sys.argv[1:]
    ways = build(side, workload, sizes_of(changes))
    for run in ways.values():
        for _ in range(WARM_UP_RUNS):
            run()
    found = tried(ways) if len(ways) > 1 else dict.fromkeys(ways, 0.0)
    print(json.dumps(found), flush=True)
    run = ways[next(iter(found))]
    for _ in sys.stdin:
        print(seconds(run), flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


if __name__ == "__main__":
    main()
