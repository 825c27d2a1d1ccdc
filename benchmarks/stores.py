"""What a store and its index cost: processor time of each stage and process, memory and bytes.

    python -m benchmarks.stores --passages=psgs.jsonl [--count=100000] [--processes=1,2,4]

The passages of a file, as often as needed with new ids, become a store and an int8 index, with the
tokenizers and the retriever of a model (`--model`). Each number of processes makes them anew, in
processes of this machine that share four devices. Bytes are those of the finished store.
"""

import argparse
import itertools
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import atlas_jax
from atlas_jax.core.file_sets import read_passages

NANO = Path(atlas_jax.__file__).parent / "checkpoints" / "nano"
Figures = dict[str, float]


def corpus(source: str, target: Path, count: int) -> None:
    """Write so many passages with ids of their own."""
    some = [record for _, record in read_passages(source)]
    with target.open("w", encoding="utf-8") as file:
        for number, record in enumerate(itertools.islice(itertools.cycle(some), count)):
            file.write(json.dumps({**record, "id": f"{number}"}, ensure_ascii=False) + "\n")


def measure(passages: Path, folder: Path, model: Path, processes: int, last: str) -> list[Figures]:
    """The figures of each process of a run, see `stores_worker`.

    Raises:
      subprocess.CalledProcessError: one of them failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.stores_worker"]
    rest = [str(processes), str(port), str(passages), str(folder), str(model), last]
    running = [
        subprocess.Popen([*command, str(index), *rest], stdout=subprocess.PIPE, text=True)
        for index in range(processes)
    ]
    told = [process.communicate()[0] for process in running]
    for process in running:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
    return [json.loads(text.splitlines()[-1]) for text in told]


def stored(folder: Path, count: int) -> Figures:
    """Bytes of the files of a store, for each passage."""

    def size(pattern: str) -> float:
        return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file()) / count

    return {
        "text": size("store/shards/*/text.jsonl"),
        "reader tokens": size("store/shards/*/reader/c/*"),
        "retriever tokens": size("store/shards/*/retriever/c/*"),
        "all of the store": size("store/**/*"),
        "index": size("index/**/*"),
    }


def table(found: list[Figures], seconds: float) -> Table:
    """The figures of a run's processes, one column each."""
    made = Table(f"{seconds:.0f} s in all", *(f"process {i}" for i in range(len(found))))
    made.add_column("most / least")
    for name in dict.fromkeys(itertools.chain(*found)):
        own = [one.get(name, 0.0) for one in found]
        ratio = f"{max(own) / min(own):.2f}" if min(own) > 0 else ""
        made.add_row(name, *(f"{figure:,.1f}" for figure in own), ratio)
    return made


def main() -> None:
    """Measure, and print a table for each number of processes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--passages", required=True)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--model", type=Path, default=NANO)
    parser.add_argument("--processes", default="1,2,4", help="numbers that divide 4")
    parser.add_argument("--last", choices=("store", "index"), default="index", help="what is made")
    flags = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as name:
        passages = Path(name) / "passages.jsonl"
        corpus(flags.passages, passages, flags.count)
        for count in map(int, flags.processes.split(",")):
            folder, started = Path(name) / str(count), time.monotonic()
            folder.mkdir()
            found = measure(passages, folder, flags.model, count, flags.last)
            console.print(table(found, time.monotonic() - started))
            sizes = stored(folder, flags.count)
            console.print({name: round(size, 1) for name, size in sizes.items()})


if __name__ == "__main__":
    main()
