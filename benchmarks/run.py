"""Time ours against the alternatives, in pairs, and print ratios, spread and peak memory.

    python -m benchmarks.run [--rounds 7] [--json FILE] [--workloads train_step,embed]
                             [--squad FOLDER]

Both sides of a workload are alive at once and take turns, so that a slow spell of the
machine hits both. A ratio above 1 means that ours is faster. Exact search is compared with the
fastest of the ways in ``benchmarks.alternatives``; all are listed. Workloads such as
``step_factbook`` read real texts as long as they come (``benchmarks.real_text``). GFLOP/s are of
the work that has to be done (``benchmarks.workloads.gflop``). Both sides keep the memory that they
free, unless GLIBC_TUNABLES says otherwise (set but empty: the C library's defaults). Variables that
choose another kernel of a library or bind its threads are taken away from both.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks import real_text
from benchmarks.worker import REAL, WORKLOADS
from benchmarks.workloads import gflop, sizes_of

SIDES = {"ours": "ours", "theirs": "alternatives"}
PACKAGES = ("jax", "flax", "torch", "transformers", "faiss-cpu")
# Without it each turn begins with page faults: what a side freed, the system has taken back
# while the other side had its turn. It takes all three.
KEEP_FREED_MEMORY = (
    "glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592"
)
# They make OpenBLAS, MKL or OpenMP choose a kernel, an instruction set or a number of threads.
CRIPPLING = ("OPENBLAS_", "GOTO_", "BLIS_", "MKL_", "OMP_", "GOMP_", "KMP_", "ONEDNN_", "ATEN_")


def crippling() -> list[str]:
    """Variables of the environment that would make an alternative slower than it is."""
    return sorted(name for name in os.environ if name.startswith(CRIPPLING))


def cores() -> int:
    """Cores that this process, and so both sides, may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tunables() -> str:
    """The C library's setting that both sides run with."""
    return os.environ.get("GLIBC_TUNABLES", KEEP_FREED_MEMORY)


def environment() -> dict[str, str]:
    """What the processes that are measured run in."""
    return {
        **{name: value for name, value in os.environ.items() if name not in crippling()},
        "JAX_PLATFORMS": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "GLIBC_TUNABLES": tunables(),
    }


@contextmanager
def worker(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A module in a process that is measured: it is told lines and answers them."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def answer(process: subprocess.Popen[str]) -> str:
    """The next line that a measured process prints."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"benchmark worker {process.args!r} ended with {process.wait()}")
    return line.strip()


def measure(workload: str, rounds: int, sizes: list[str]) -> dict[str, Any]:
    """Seconds of every round and peak memory (MiB) of both sides."""
    with (
        worker("benchmarks.worker", SIDES["ours"], workload, *sizes) as ours,
        worker("benchmarks.worker", SIDES["theirs"], workload, *sizes) as theirs,
    ):
        sides = {"ours": ours, "theirs": theirs}
        ways = {name: json.loads(answer(process)) for name, process in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in tqdm(range(rounds), desc=workload, leave=False):
            for name, process in sides.items():
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                seconds[name].append(float(answer(process)))
        peak = {}
        for name, process in sides.items():
            assert process.stdin is not None
            process.stdin.close()
            peak[name] = float(answer(process))
    work = (real_text.gflop if workload in REAL else gflop)(workload, sizes_of(sizes))
    ratios = [t / o for o, t in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "workload": workload,
        "seconds": seconds,
        "gflop": work,
        "gflop_per_s": {name: work / statistics.median(s) for name, s in seconds.items()},
        "ways": ways,
        "peak_mib": peak,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def table(results: list[dict[str, Any]]) -> Table:
    """One line per workload: of both sides median seconds, GFLOP/s and peak memory; their ratio."""
    out = Table(title="theirs / ours; above 1 = ours is faster")
    sides = [f"{side} {unit}" for unit in ("s", "GFLOP/s", "MiB") for side in SIDES]
    for column in ("workload", "ratio", "range", *sides):
        out.add_column(column, justify="left" if column == "workload" else "right")
    for r in results:
        out.add_row(
            r["workload"],
            f"{r['ratio']:.2f}",
            f"{r['ratio_low']:.2f}-{r['ratio_high']:.2f}",
            *(f"{statistics.median(r['seconds'][side]):.3f}" for side in SIDES),
            *(f"{r['gflop_per_s'][side]:.0f}" for side in SIDES),
            *(f"{r['peak_mib'][side]:.0f}" for side in SIDES),
        )
    return out


def ways_table(result: dict[str, Any]) -> Table:
    """The ways that were tried on the other side of a workload, the fastest first."""
    out = Table("way", title=f"{result['workload']}: the ways of the alternatives, best of a few")
    for column in ("s", "GFLOP/s"):
        out.add_column(column, justify="right")
    for name, seconds in result["ways"]["theirs"].items():
        out.add_row(name, f"{seconds:.3f}", f"{result['gflop'] / seconds:.0f}")
    return out


def main() -> int:
    """Run the chosen workloads; exit code 1 when one of them is slower than its alternative."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="also write every figure to this file")
    parser.add_argument("--workloads", default="", help="comma-separated; all that can run")
    parser.add_argument("--squad", default="", help="folder with SQuAD's passages and questions")
    parser.add_argument("sizes", nargs="*", help="Sizes field=value, to try a smaller problem")
    args = parser.parse_args()
    chosen = args.workloads.split(",") if args.workloads else [*WORKLOADS]
    unknown = set(chosen) - set(WORKLOADS)
    if unknown:
        parser.error(f"unknown workloads {sorted(unknown)}; known: {', '.join(WORKLOADS)}")
    without = [name for name in chosen if name.endswith("squad") and not args.squad]
    if without and args.workloads:
        parser.error(f"{', '.join(without)}: name SQuAD's folder with --squad")
    if args.squad:
        args.sizes.append(f"squad={args.squad}")
    chosen = [name for name in chosen if name not in without]
    if without:
        print("SQuAD's workloads are left out: name its folder with --squad")
    results = []
    for workload in tqdm(chosen, desc="workloads"):
        results.append(measure(workload, args.rounds, args.sizes))
    console = Console(width=110)
    console.print(table(results))
    for result in results:
        if len(result["ways"]["theirs"]) > 1:
            console.print(ways_table(result))
    versions = {name: metadata.version(name) for name in PACKAGES}
    for corpus in real_text.CORPORA:
        if any(name.endswith(corpus) for name in chosen):
            lengths = real_text.lengths(sizes_of(args.sizes), corpus)
            print(
                f"{corpus}: {lengths.mean():.0f} tokens an input on average, {lengths.max()} most"
            )
    print(f"{cores()} cores, {platform.machine()}, {versions}")
    print(f"GLIBC_TUNABLES={tunables()}")
    if crippling():
        print(f"not given to either side: {', '.join(crippling())}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(
                {
                    "versions": versions,
                    "glibc_tunables": tunables(),
                    "sizes": args.sizes,
                    "results": results,
                },
                file,
                indent=1,
            )
    return 0 if all(r["ratio"] >= 1 for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
