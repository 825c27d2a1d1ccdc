"""What a change of a loaded corpus costs: one passage replaced, and a hundred added.

    python -m benchmarks.living [--changes 60]
    python -m benchmarks.living --model=work/mini --states --first=2000

The nano pair, or another model, over the Factbook's passages, on the disk and on the devices,
embedding included; with ``--states`` also the states that a reader keeps of passages.
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


def measure(changes: int, model: Path, states: bool, first_rows: int) -> dict[str, str]:
    """All figures, worded."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        factbook.prepare(folder / "data")
        passages = folder / "data" / "passages.jsonl"
        lines = passages.read_text("utf-8").splitlines(keepends=True)[: first_rows or None]
        passages.write_text("".join(lines), "utf-8")
        told: dict[str, Any] = {"store": folder / "store", "index": folder / "index"}
        build = seconds(lambda: atlas_jax.build_index(model, passages=passages, **told))
        some = [json.loads(line) for line in lines[:ADDED]]
        kept: dict[str, Any] = {"reader_states": folder / "states"} if states else {}
        atlas = atlas_jax.load(model, **told, **kept, capacity=len(lines) + 1000)

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
        "passages": f"{len(lines):,}",
        "one replaced, the first time (compiles)": f"{first:.2f} s",
        f"one replaced, median of {changes} more": f"{1000 * statistics.median(later):.0f} ms",
        "one replaced, 5 % and 95 %": f"{1000 * ordered[changes // 20]:.0f} and "
        f"{1000 * ordered[-1 - changes // 20]:.0f} ms",
        f"{ADDED} added, the first time (compiles)": f"{cold:.2f} s",
        f"{ADDED} more": f"{warm:.2f} s",
        f"{ADDED} added the first time / store and index built": f"{cold / build:.3f}",
        f"{ADDED} more / store and index built": f"{warm / build:.3f}",
    }


def main() -> None:
    """Print the figures as a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--changes", type=int, default=60, help="of one passage each")
    parser.add_argument("--model", type=Path, default=NANO, help="folder of both models")
    parser.add_argument("--states", action="store_true", help="keep the reader's states, too")
    parser.add_argument("--first", type=int, default=0, help="so many passages alone; 0 = all")
    flags = parser.parse_args()
    table = Table("a loaded corpus is changed", "figure")
    told = measure(flags.changes, flags.model, flags.states, flags.first)
    for name, value in told.items():
        table.add_row(name, value)
    Console().print(table)


if __name__ == "__main__":
    main()
