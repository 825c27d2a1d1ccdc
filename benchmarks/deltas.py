"""What part of a reader has to train: adapters, LoRA, prefixes and prompts beside all of it.

    python -m benchmarks.deltas [--steps 360] [--count 300] [--seeds 1] [--rows all,LoRA]
        [--minutes 4] [--results docs/reports/deltas.json]

The nano pair takes the demo's lesson: the words of 64 questions, asked of the titles of the
training countries. Every row has the same steps, batches and passages; the retriever is fixed. Dev
questions about countries that no training question names are then answered from the passage that
the retriever finds first. Each row has its rate from `ROWS`. What is done is kept in --results
(`benchmarks.kept`), and is not run again.
"""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import atlas_jax
from atlas_jax.core.config import gin_folder
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import read_jsonl, write_jsonl
from atlas_jax.demo import factbook
from atlas_jax.demo.paths import nano_checkpoint
from atlas_jax.models.fingerprint import model_hash
from atlas_jax.models.folder import load_model, read_about
from atlas_jax.training.metrics import read_metrics
from benchmarks.kept import Figures, Kept, Wanted, begun, key_of, put_between, run_missing

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

Settings = dict[str, int]  # steps, and how many questions
RESULTS = Path("docs/reports/deltas.json")


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


def measured(run: Path, corpus: dict[str, Any], questions: Path) -> Figures:
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


def wanted(folder: Path, rows: Sequence[str], told: Settings, seeds: int) -> Iterator[Wanted]:
    """Every row with every seed, a whole seed after the other."""
    corpus: dict[str, Any] = {"store": folder / "store", "index": folder / "index"}
    data = folder / "data"
    ready: list[Path] = []

    def figures(row: str, seed: int) -> Figures:
        if not ready:  # nothing is prepared where nothing is missing
            factbook.prepare(data)
            asked = [line for _, line in read_jsonl(data / "dev.jsonl")]
            count = told["count"]
            write_jsonl(data / "asked.jsonl", asked[:: max(1, len(asked) // count)][:count])
            atlas_jax.build_index(nano_checkpoint(), passages=data / "passages.jsonl", **corpus)
            ready.append(data / "asked.jsonl")
        run = train(row, folder, data, told["steps"], seed)
        return measured(run, corpus, ready[0])

    for seed in range(seeds):
        for row in rows:
            file, rate = ROWS[row]
            files = ["runs/demo_read.gin", *([f"deltas/{file}.gin"] if file else [])]
            recipe = [(gin_folder() / one).read_text("utf-8") for one in files]
            yield Wanted(f"{row}/{seed}", key_of(recipe, rate), partial(figures, row, seed))


def _reader_hash() -> str:
    """What identifies the reader that every row begins with."""
    reader = load_model(nano_checkpoint(), ("reader",))["reader"]
    return model_hash(reader.params, reader.tokenizer)[:16]


def table(kept: Kept) -> str:
    """Means over the seeds; steps are told as shares of the time that training all takes."""
    found: list[dict[str, Any]] = [
        {"row": name.rpartition("/")[0], **one.figures} for name, one in kept.runs.items()
    ]
    every, whole = (
        statistics.mean([one[name] for one in found if one["row"] == ALL] or [math.nan])
        for name in ("trained", "seconds")
    )
    lines = [
        "| what trains | rate | seeds | EM | F1 | trained parameters | on disk | time of a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        runs = [one for one in found if one["row"] == row]
        if not runs:
            lines.append(f"| {row} | {ROWS[row][1]:g} | not run | | | | | |")
            continue
        mean = {name: statistics.mean(one[name] for one in runs)
                for name in ("EM", "F1", "trained", "bytes", "seconds")}  # fmt: skip
        share = "" if row == ALL else f" ({100 * mean['trained'] / every:.1f} %)"
        lines.append(
            f"| {row} | {ROWS[row][1]:g} | {len(runs)} | {mean['EM']:.1f} | {mean['F1']:.1f} "
            f"| {mean['trained']:,.0f}{share} | {mean['bytes'] / 1e6:.2f} MB "
            f"| {mean['seconds'] / whole:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--count", type=int, default=300, help="dev questions")
    parser.add_argument("--seeds", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--rows", default=",".join(ROWS), help="names, with commas between them")
    parser.add_argument("--minutes", type=float, default=0, help="begin no run after this")
    parser.add_argument("--results", default=str(RESULTS), help="file that keeps the figures")
    parser.add_argument("--page", default="", help="page to put the table into")
    told = parser.parse_args(argv)
    rows = told.rows.split(",")
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        parser.error(f"--rows: no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    settings: Settings = {"steps": told.steps, "count": told.count}
    results = Path(told.results)
    try:
        kept = begun(results, {**settings, "reader": _reader_hash()})
        with tempfile.TemporaryDirectory() as name:
            missing = wanted(Path(name), rows, settings, told.seeds)
            kept = run_missing(results, kept, missing, told.minutes)
        print(table(kept))
        if told.page:
            put_between(Path(told.page), table(kept))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
