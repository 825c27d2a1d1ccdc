"""How well a taught model reads what it was not taught on.

    python -m benchmarks.reading --model work/run/final [--part dev] [--count 200]

The model is asked about the Factbook: in the words of its question files, in other words, and with
the corpus cut into passages another way (`atlas_jax/demo/factbook_variants.py`). Each is asked with
several numbers of passages. Choose settings on `dev`; `test` is for the last figures.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

import atlas_jax
from atlas_jax.core.jsonl import read_jsonl, write_jsonl
from atlas_jax.demo import factbook
from atlas_jax.demo.factbook_variants import cut_again, found_again, reworded

READS = (1, 4, 8, 16)


def measure(model: Path, suites: Mapping[str, tuple[Path, Path]]) -> dict[str, dict[str, float]]:
    """Exact match, F1 and recall of each suite, by the name of the suite."""
    found: dict[str, dict[str, float]] = {}
    for name, (passages, questions) in suites.items():
        store, index = passages.with_suffix(".store"), passages.with_suffix(".index")
        if not index.exists():
            atlas_jax.build_index(model, passages=passages, store=store, index=index)
        atlas = atlas_jax.load(model, store=store, index=index)
        row: dict[str, float] = {}
        for k in READS:
            scores = atlas.evaluate(questions, k=k, loss="none").scores
            row |= {f"EM {k}": scores["exact_match"], f"F1 {k}": scores["f1"]}
            row |= {name: score for name, score in scores.items() if name.startswith("recall@")}
        found[name] = {metric: 100.0 * score for metric, score in row.items()}
        print(json.dumps({name: found[name]}), flush=True)
    return found


def suites_of(folder: Path, part: str, count: int) -> dict[str, tuple[Path, Path]]:
    """Write passages and questions of every suite."""
    factbook.prepare(folder)
    asked = [row for _, row in read_jsonl(folder / f"{part}.jsonl")]
    asked = asked[:: max(1, len(asked) // count)][:count] if count else asked
    whole = folder / "passages.jsonl"
    other = folder / "cut_again.jsonl"
    pieces = cut_again(row for _, row in read_jsonl(whole))
    write_jsonl(other, pieces)
    write_jsonl(folder / "asked.jsonl", asked)
    write_jsonl(folder / "reworded.jsonl", map(reworded, asked))
    write_jsonl(folder / "asked_again.jsonl", found_again(asked, pieces))
    return {
        "Factbook": (whole, folder / "asked.jsonl"),
        "other words": (whole, folder / "reworded.jsonl"),
        "another cut": (other, folder / "asked_again.jsonl"),
    }


def main() -> None:
    """Print a table of all suites."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--part", choices=("dev", "test"), default="dev", help="countries")
    parser.add_argument("--count", type=int, default=200, help="questions of a suite; 0 = all")
    parser.add_argument("--work", type=Path, help="folder that keeps corpora and indices")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = told.work or Path(name)
        found = measure(told.model, suites_of(folder, told.part, told.count))
    table = Table("", *(f"EM / F1, k = {k}" for k in READS), "recall@1/5/20")
    for suite, row in found.items():
        cells = (f"{row[f'EM {k}']:.1f} / {row[f'F1 {k}']:.1f}" for k in READS)
        recall = "/".join(f"{row[f'recall@{k}']:.1f}" for k in (1, 5, 20))
        table.add_row(suite, *cells, recall)
    Console().print(table)


if __name__ == "__main__":
    main()
