"""Search at scale: six ways at equal recall, over a million vectors of real text.

    python -m benchmarks.search [--rows 1000000] [--folder work/search] [--json FILE]
    python -m benchmarks.search --embeddings mine.npy --queries asked.npy

Passages and questions of the Factbook are embedded by MiniLM (the pip package of
`atlas-jax mini`), and the passages repeated with noise up to --rows; or both are your own arrays,
[n, e] and [q, e] in float32. Every way is built once, in a process of its own; what is built stays
in --folder and is used again. Then all are loaded, take turns, and are searched in batches of 64 at
the cheapest setting that reaches a recall@10 of 0.95, and of 0.99. Rates are told as ratios to the
exact search of float32 rows in the same round.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from atlas_jax.demo import factbook
from atlas_jax.mini import convert_minilm
from atlas_jax.training.chips import CHIPS
from benchmarks.run import answer, environment, worker
from benchmarks.search_ways import WAYS, K
from benchmarks.search_worker import AIMS, BATCH, QUERIES, TRUTH, TUNED_ON, VECTORS
from benchmarks.vectors import embedded, repeated

_BLOCK = 65_536  # rows that are compared at once for the truth
_ASKED = 640  # queries, drawn from those given
_WORKER = "benchmarks.search_worker"
_FIRST = "exact"  # the way that all are compared with


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, default=Path("work/search"), help="where all is kept")
    add("--rows", type=int, default=1_000_000)
    add("--noise", type=float, default=0.5, help="length of the noise / the vector's")
    add("--embeddings", type=Path, help=".npy of your own, float32 [n, e]; needs --queries")
    add("--queries", type=Path, help=".npy of your own, float32 [q, e]")
    add("--ways", default=",".join(WAYS), help="comma-separated; exact is always one of them")
    add("--rounds", type=int, default=3)
    add("--build_only", action="store_true", help="stop when everything is built")
    add("--json", type=Path, help="also write every figure to this file")
    flags = parser.parse_args(argv)
    chosen = [name for name in WAYS if name == _FIRST or name in flags.ways.split(",")]
    unknown = set(flags.ways.split(",")) - set(WAYS)
    if unknown:
        parser.error(f"unknown ways {sorted(unknown)}; known: {', '.join(WAYS)}")
    if (flags.embeddings is None) != (flags.queries is None):
        parser.error("give --embeddings and --queries, or neither")
    flags.folder.mkdir(parents=True, exist_ok=True)
    prepare(flags)
    built = {name: build(name, flags.folder) for name in chosen}
    if flags.build_only:
        return 0
    results = measure(chosen, flags.folder, flags.rounds)
    for name, result in results.items():
        result |= built[name]
    console = Console(width=140)
    console.print(table(results))
    print(planned(*np.load(flags.folder / VECTORS, mmap_mode="r").shape))
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=1))
    return 0


def prepare(flags: argparse.Namespace) -> None:
    """Write vectors, queries and the rows that are really the best, where they are missing."""
    folder: Path = flags.folder
    vectors, queries = folder / VECTORS, folder / QUERIES
    if not queries.exists():
        if flags.embeddings is not None:
            base, asked, rows = np.load(flags.embeddings, mmap_mode="r"), np.load(flags.queries), 0
        else:
            base, asked = _of_the_factbook(folder)
            rows = flags.rows
        n = max(rows, len(base))
        shape = (n, base.shape[1])
        out = np.lib.format.open_memmap(vectors, mode="w+", dtype=np.float32, shape=shape)
        repeated(base, out, flags.noise)
        out.flush()
        order = np.random.default_rng(1).permutation(len(asked))[:_ASKED]
        np.save(queries, np.asarray(asked, np.float32)[order])
    if not (folder / TRUTH).exists():
        rows_ne, query_be = np.load(vectors, mmap_mode="r"), np.load(queries)
        if len(query_be) < TUNED_ON + BATCH:
            raise SystemExit(f"{len(query_be)} queries; give {TUNED_ON + BATCH} or more")
        np.save(folder / TRUTH, best_rows(rows_ne, query_be))


def _of_the_factbook(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    texts, model = folder / "factbook", folder / "minilm"
    factbook.prepare(texts)
    if not model.exists():
        convert_minilm(model)
    return embedded(str(model), str(texts / "passages.jsonl"), str(texts / "test.jsonl"))


def best_rows(rows_ne: np.ndarray, query_be: np.ndarray) -> np.ndarray:
    """The K rows [b, K] with the greatest inner products, by NumPy."""
    scores_bc = np.zeros((len(query_be), 0), np.float32)
    rows_bc = np.zeros((len(query_be), 0), np.int64)
    for start in tqdm(range(0, len(rows_ne), _BLOCK), desc="truth"):
        scores_bn = query_be @ rows_ne[start : start + _BLOCK].T
        at_bk = np.argpartition(scores_bn, -min(K, scores_bn.shape[1]), axis=1)[:, -K:]
        scores_bc = np.concatenate([scores_bc, np.take_along_axis(scores_bn, at_bk, 1)], axis=1)
        rows_bc = np.concatenate([rows_bc, at_bk + start], axis=1)
    best_bk = np.argsort(-scores_bc, axis=1, kind="stable")[:, :K]
    return np.take_along_axis(rows_bc, best_bk, axis=1)


def build(name: str, folder: Path) -> dict[str, float]:
    """Build a way, unless it is built; what that took."""
    told = folder / f"{name}.json"
    if not told.exists():
        print(f"building {WAYS[name].name}", file=sys.stderr)
        subprocess.run(
            [sys.executable, "-m", _WORKER, "build", name, str(folder)],
            check=True,
            env=environment(),
        )
    found: dict[str, float] = json.loads(told.read_text())
    return found


def measure(chosen: Sequence[str], folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Load all ways, one after the other, and let them take turns."""
    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as alive:
        workers = {}
        for name in tqdm(chosen, desc="loading and tuning"):
            workers[name] = alive.enter_context(worker(_WORKER, "search", name, str(folder)))
            results[name] = json.loads(answer(workers[name]))
            results[name]["seconds"] = [[] for _ in AIMS]
        for _ in tqdm(range(rounds), desc="rounds"):
            for aim in range(len(AIMS)):
                for name, process in workers.items():
                    if results[name]["aims"][aim] is None:
                        continue
                    assert process.stdin is not None
                    process.stdin.write(f"{aim}\n")
                    process.stdin.flush()
                    results[name]["seconds"][aim].append(float(answer(process)))
    return results


def table(results: dict[str, dict[str, Any]]) -> Table:
    """One line for each way and aim."""
    out = Table(title="queries a second / those of exact search in float32, at equal recall@10")
    names = ("aim", "recall", "setting", "ratio", "range", "q/s", "build s", "memory MiB")
    for column in ("way", *names, "disk MiB"):
        out.add_column(column, justify="left" if column == "way" else "right")
    for number, aim in enumerate(AIMS):
        first = results[_FIRST]["seconds"][number]
        for name, one in results.items():
            at = one["aims"][number]
            if at is None:
                out.add_row(WAYS[name].name, str(aim), "not reached", *[""] * 7)
                continue
            seconds = one["seconds"][number]
            ratios = [f / s for f, s in zip(first, seconds, strict=True)]
            rate = one["queries"] / statistics.median(seconds)
            out.add_row(
                WAYS[name].name, str(aim), f"{at['recall']:.3f}", str(at["setting"]),
                f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}",
                f"{rate:.0f}", f"{one['build_seconds']:.0f}", f"{one['memory_mib']:.0f}",
                f"{one['disk_mib']:.0f}",
            )  # fmt: skip
    return out


def planned(rows: int, width: int, name: str = "v5e") -> str:
    """What a chip cannot beat for a batch over int8 rows: reading them once, and their products."""
    chip = CHIPS[name]
    read = rows * (width + 4) / chip.hbm_bandwidth
    products = 2 * BATCH * rows * width / chip.bf16_flops
    return (
        f"one {name} chip, {BATCH} queries over int8 rows: {1000 * read:.2f} ms to read them, "
        f"{1000 * products:.2f} ms of products; at most {BATCH / max(read, products):,.0f} queries "
        "a second"
    )


if __name__ == "__main__":
    raise SystemExit(main())
