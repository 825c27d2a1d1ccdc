"""What a change of a loaded corpus costs: one passage replaced, and a hundred added.

    python -m benchmarks.living [--changes 60]

The nano pair over the Factbook's passages, on the disk and on the devices, embedding included.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import atlas_jax
from atlas_jax.demo import factbook

NANO = Path(atlas_jax.__file__).parent / "checkpoints" / "nano"
ADDED = 100


def seconds(function: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(changes: int) -> dict[str, str]:
    """All figures, worded."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        factbook.prepare(folder / "data")
        passages = folder / "data" / "passages.jsonl"
        told = {"store": folder / "store", "index": folder / "index"}
        build = seconds(lambda: atlas_jax.build_index(NANO, passages=passages, **told))
        with passages.open(encoding="utf-8") as lines:
            some = [json.loads(next(lines)) for _ in range(ADDED)]
        atlas = atlas_jax.load(NANO, **told, capacity=12_000)
        count = atlas.store.count if atlas.store else 0

        def replace(number: int) -> float:
            one = {**some[0], "text": f"The text number {number}."}
            return seconds(lambda: atlas.replace_passages([one]))

        first, *later = (replace(number) for number in range(changes + 1))

        def add(turn: str) -> float:
            new = [{**one, "id": f"{turn}-{one['id']}"} for one in some]
            return seconds(lambda: atlas.add_passages(new))

        cold, warm = add("first"), add("again")
    ordered = sorted(later)
    return {
        "passages": f"{count:,}",
        "one replaced, the first time (compiles)": f"{first:.2f} s",
        f"one replaced, median of {changes} more": f"{1000 * statistics.median(later):.0f} ms",
        "one replaced, 5 % and 95 %": f"{1000 * ordered[changes // 20]:.0f} and "
        f"{1000 * ordered[-1 - changes // 20]:.0f} ms",
        f"{ADDED} added, the first time (compiles)": f"{cold:.2f} s",
        f"{ADDED} more": f"{warm:.2f} s",
        f"{ADDED} more / store and index built": f"{warm / build:.3f}",
    }


def main() -> None:
    """Print the figures as a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--changes", type=int, default=60, help="of one passage each")
    table = Table("a loaded corpus is changed", "figure")
    for name, value in measure(parser.parse_args().changes).items():
        table.add_row(name, value)
    Console().print(table)


if __name__ == "__main__":
    main()
