"""One side of one workload in a process of its own: warm up, then one timed run per line read.

Started by ``benchmarks.run``. Prints ``ready``, then one time in seconds per line of
standard input, and at its end the process's peak memory in MiB.
"""

import importlib
import resource
import sys
import time
from collections.abc import Callable

from benchmarks.workloads import Sizes

WORKLOADS = ("train_step", "generate", "embed", "search_8", "search_100")
WARM_UP_RUNS = 2


def build(side: str, workload: str, sizes: Sizes) -> Callable[[], object]:
    """The function to time, from ``benchmarks.ours`` or ``benchmarks.alternatives``."""
    module = importlib.import_module(f"benchmarks.{side}")
    name, _, k = workload.partition("search_")
    return module.search(sizes, int(k)) if k else getattr(module, name)(sizes)


def main() -> None:
    """Serve timed runs until standard input ends."""
    side, workload, *changes = sys.argv[1:]
    sizes = Sizes(**{name: int(value) for name, value in (c.split("=") for c in changes)})
    run = build(side, workload, sizes)
    for _ in range(WARM_UP_RUNS):
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


if __name__ == "__main__":
    main()
