"""What part of a reader has to train: adapters, LoRA, prefixes and prompts beside all of it.

    python -m benchmarks.deltas [--steps 360] [--count 300] [--seeds 1] [--rows all,LoRA]

The nano pair takes the demo's lesson: the words of 64 questions, asked of the titles of the
training countries. Every row has the same steps, batches and passages; the retriever is fixed. Dev
questions about countries that no training question names are then answered from the passage that
the retriever finds first. Each row has its rate from `RATES`.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import atlas_jax
from atlas_jax.core.jsonl import read_jsonl, write_jsonl
from atlas_jax.demo import factbook
from atlas_jax.demo.paths import nano_checkpoint
from atlas_jax.models.folder import read_about
from atlas_jax.training.metrics import read_metrics

ALL = "all"
# Row -> its file of gin/deltas, and its learning rate.
ROWS: dict[str, tuple[str, float]] = {
    ALL: ("", 1e-3),
    "adapters (LiST)": ("list", 3e-3),
    "adapters (Houlsby)": ("houlsby", 3e-3),
    "LoRA": ("lora", 1e-2),
    "prefix": ("prefix", 3e-3),
    "P-tuning": ("p_tuning", 3e-3),
}
# Only the reader learns, and its rate is the row's, without a schedule of the file's own.
_READER_ALONE = ("retriever/DeltaConfig.kind='none'", "reader/OptimizerConfig.kind='adamw'")

Figures = dict[str, Any]


def train(row: str, folder: Path, data: Path, steps: int, seed: int) -> Path:
    """The model folder of one run."""
    file, rate = ROWS[row]
    run = folder / f"{file or ALL}_{seed}"
    bindings = [
        f"MODEL_DIR='{run}'", f"INITIAL_CHECKPOINT_PATH='{nano_checkpoint()}'",
        f"QUESTION_FILE='{data}/train_64shot_seed{seed}.jsonl'",
        f"TRAIN_FILE='{data}/passages_pretraining.jsonl'", f"TRAIN_STEPS={steps}",
        f"READER_LEARNING_RATE={rate}", f"TrainConfig.seed={seed}",
        *(_READER_ALONE if file else ()),
    ]  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "atlas_jax", "train", "--gin_file=runs/demo_read.gin",
         *([f"--gin_file=deltas/{file}.gin"] if file else []),
         *(f"--gin.{binding}" for binding in bindings)],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return run


def measured(run: Path, corpus: dict[str, Path], questions: Path) -> Figures:
    """Scores of a run's model, and what it cost."""
    rows = [row for row in read_metrics(run) if "train/seconds_per_step" in row]
    times = [row["train/seconds_per_step"] for row in rows[1:] or rows]
    about = read_about(run / "final")
    scores = atlas_jax.load(run / "final", **corpus).evaluate(questions, k=1, loss="none").scores
    return {
        "EM": 100.0 * scores["exact_match"],
        "F1": 100.0 * scores["f1"],
        "trained": about["trained"],
        "bytes": sum(file.stat().st_size for file in (run / "final").glob("reader*.safetensors")),
        "seconds": statistics.median(times),
    }


def measure(folder: Path, rows: Sequence[str], steps: int, count: int, seeds: int) -> list[Figures]:
    """Every row with every seed; what is done is printed at once."""
    data = folder / "data"
    factbook.prepare(data)
    asked = [row for _, row in read_jsonl(data / "dev.jsonl")]
    write_jsonl(data / "asked.jsonl", asked[:: max(1, len(asked) // count)][:count])
    corpus = {"store": folder / "store", "index": folder / "index"}
    atlas_jax.build_index(nano_checkpoint(), passages=data / "passages.jsonl", **corpus)
    found = []
    for row in rows:
        for seed in range(seeds):
            run = train(row, folder, data, steps, seed)
            found.append({"row": row, "seed": seed, **measured(run, corpus, data / "asked.jsonl")})
            print(json.dumps(found[-1]), flush=True)
    return found


def table(found: Sequence[Figures]) -> Table:
    """Means over the seeds; steps are told as shares of the time that training all takes."""
    whole = statistics.mean([one["seconds"] for one in found if one["row"] == ALL] or [math.nan])
    drawn = Table("what trains", "rate", "EM", "F1", "trained", "on disk", "step")
    for row in dict.fromkeys(one["row"] for one in found):
        runs = [one for one in found if one["row"] == row]
        mean = {name: statistics.mean(one[name] for one in runs)
                for name in ("EM", "F1", "bytes", "seconds")}  # fmt: skip
        drawn.add_row(
            row, f"{ROWS[row][1]:g}", f"{mean['EM']:.1f}", f"{mean['F1']:.1f}",
            f"{runs[0]['trained']:,}", f"{mean['bytes'] / 1e6:.2f} MB",
            f"{mean['seconds'] / whole:.2f}",
        )  # fmt: skip
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--count", type=int, default=300, help="dev questions")
    parser.add_argument("--seeds", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--rows", default=",".join(ROWS), help="names, with commas between them")
    told = parser.parse_args(argv)
    rows = told.rows.split(",")
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        parser.error(f"--rows: no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), rows, told.steps, told.count, told.seeds)
    Console().print(table(found))


if __name__ == "__main__":
    main()
