"""The demo: from the World Factbook to answered, scored questions about unseen countries.

Prepares corpus and questions, indexes the corpus with the shipped nano model, teaches it the
task from 64 questions in three ways (closed book, fixed retriever, retriever trained along),
evaluates each on countries that no training question names, and swaps passages of the index.
Everything runs through the same entry points that users run; each command is shown.
"""

import argparse
import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from atlas_jax import build_index, evaluate, train
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import read_jsonl, write_jsonl
from atlas_jax.demo import factbook
from atlas_jax.demo.bm25 import RECALL_AT, bm25_recall
from atlas_jax.demo.index_swap import choose, judge, swap_index
from atlas_jax.demo.paths import bind, nano_checkpoint
from atlas_jax.demo.plot import write_plot
from atlas_jax.demo.report import Results, Row, Swap, show, write_results
from atlas_jax.demo.results import samples, scores
from atlas_jax.demo.stages import Stages
from atlas_jax.training.config import FINAL, PREDICTIONS
from atlas_jax.training.data import DataConfig
from atlas_jax.training.step import StepConfig

MARKER = ".atlas-jax-demo"
SAMPLES = 5
SWAPS = 8

PREPARE = "prepare the World Factbook"
INDEX = "index the corpus with the nano model"
BEFORE = "retrieval before any training question"
CLOSED = "64 questions, closed book"
FIXED = "64 questions, fixed retriever"
JOINT = "64 questions, retriever trained along"
SWAP = "swap passages of the index"

# What distinguishes the three runs; everything else is runs/demo_64shot.gin for all.
MODES = {
    CLOSED: (
        '--gin.TrainConfig.passages="none"',
        '--gin.EvalConfig.passages="none"',
        "--gin.RETRIEVER_TRAINING=fixed",
    ),
    FIXED: ("--gin.RETRIEVER_TRAINING=fixed",),
    JOINT: (),
}
ROW_NAMES = {CLOSED: "closed book", FIXED: "fixed retriever", JOINT: "jointly trained"}

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Place:
    """The folders of one demo run.

    Attributes:
      out: everything that the run makes.
      checkpoint: the model folder it begins with.
      store, index: the passage store and the index over it.
    """

    out: Path
    checkpoint: Path
    store: Path
    index: Path

    @classmethod
    def under(cls, out: Path, checkpoint: Path) -> "Place":
        """The usual folders of a run in `out`."""
        return cls(out, checkpoint, out / "store", out / "index")

    @property
    def data(self) -> Path:
        """Passages and questions."""
        return self.out / "data"

    def model_dir(self, mode: str) -> Path:
        """The folder of one training run."""
        return self.out / ROW_NAMES[mode].replace(" ", "_")


@dataclasses.dataclass(frozen=True)
class Reading:
    """How many passages a run read, and at what lengths."""

    step: StepConfig
    data: DataConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="atlas-jax demo", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", default="work/demo", help="folder for everything it makes")
    parser.add_argument("--checkpoint", help="model folder to begin with (default: nano)")
    parser.add_argument("--seed", type=int, choices=factbook.FEW_SHOT_SEEDS, default=0,
                        help="which 64 questions")  # fmt: skip
    parser.add_argument("bindings", nargs="*", metavar="--gin.NAME=value",
                        help="bindings for the training runs")  # fmt: skip
    arguments = list(sys.argv[1:] if argv is None else argv)
    bindings = [a for a in arguments if a.startswith("--gin.")]
    options = parser.parse_args([a for a in arguments if not a.startswith("--gin.")])
    try:
        checkpoint = Path(options.checkpoint) if options.checkpoint else nano_checkpoint()
        place = Place.under(Path(options.out), checkpoint)
        clear(place.out)
        run(place, options.seed, bindings)
    except (UserError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    return 0


def clear(out: Path) -> None:
    """Make `out` an empty folder of the demo.

    Raises:
      UserError: it holds things that the demo did not make.
    """
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UserError(f"{out} is not empty and not a demo's folder: choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()


def run(place: Place, seed: int, bindings: Sequence[str]) -> Results:
    """Run every stage and show the results."""
    console, start = Console(), time.monotonic()
    stages = Stages(console, [PREPARE, INDEX, BEFORE, *MODES, SWAP])
    with stages.stage(PREPARE):
        counts = factbook.prepare(place.data)
        stages.say(
            f"{counts['passages.jsonl']:,} passages; {counts['relations']} relations; "
            f"{counts['test.jsonl']:,} test questions"
        )
    passages, test = _read(place.data / "passages.jsonl"), _read(place.data / "test.jsonl")
    with stages.stage(INDEX):
        stages.run("build_index", build_index.main, _index_arguments(place))
    rows = []
    with stages.stage(BEFORE):
        rows += [
            Row("BM25", bm25_recall(passages, test)),
            Row("untrained retriever", _untrained(place, stages)),
        ]
        for row in rows:
            stages.say(f"{row.name}: " + ", ".join(f"{k} {v:.1f}" for k, v in row.scores.items()))
    for mode in MODES:
        with stages.stage(mode):
            stages.run("train", train.main, _train_arguments(place, mode, seed, bindings))
        rows.append(Row(ROW_NAMES[mode], scores(_predictions(place.model_dir(mode)))))
    predictions = _predictions(place.model_dir(JOINT))
    reading = Reading(StepConfig(), DataConfig())  # gin still holds the last run's configuration
    with stages.stage(SWAP):
        swaps = _swap(place, reading, predictions, test, passages, stages)
    results = Results(
        setup={
            "checkpoint": str(place.checkpoint),
            "seed": seed,
            "passages": len(passages),
            "train_questions": factbook.FEW_SHOT,
            "test_questions": len(test),
            "test_countries": len({q["entity"] for q in test}),
        },
        rows=rows,
        samples=samples(predictions, SAMPLES, reading.step.k),
        swaps=swaps,
        seconds={**stages.seconds, "all": round(time.monotonic() - start, 1)},
    )
    _present(console, place, results)
    return results


def _swap(
    place: Place,
    reading: Reading,
    predictions: Sequence[Record],
    test: Sequence[Record],
    passages: Sequence[Record],
    stages: Stages,
) -> list[Swap]:
    """Choose passages, swap them in a copy of store and index, and ask again."""
    candidates = choose(predictions, test, {p["id"]: p for p in passages}, SWAPS)
    if not candidates:
        stages.say("no test question was answered rightly from a first-ranked passage: no swap")
        return []
    folder = place.out / "swap"
    model = place.model_dir(JOINT) / FINAL
    changed = [candidate.passage for candidate in candidates]
    store, index = folder / "store", folder / "index"
    swap_index(str(model), place.store, place.index, changed, store, index)
    questions, answers = folder / "questions.jsonl", folder / "answers.jsonl"
    write_jsonl(questions, (candidate.row for candidate in candidates))
    again = dataclasses.replace(place, store=store, index=index)
    stages.run("evaluate", evaluate.main, _ask_again_arguments(again, reading, questions, answers))
    after = {row["id"]: row["prediction"] for row in _read(answers)}
    swaps = judge(candidates, after)
    for swap in swaps:
        stages.say(f"{'✓' if swap.follows else '✗'} {swap.question}")
        stages.say(f"  passage: {swap.old_value} → {swap.new_value}")
        stages.say(f"  answer:  {swap.answer_before} → {swap.answer_after}")
    return swaps


def _untrained(place: Place, stages: Stages) -> dict[str, float]:
    """Recall of the shipped retriever."""
    found = place.out / "before" / "retrieved.jsonl"
    arguments = [
        "--gin_file=runs/evaluate.gin",
        bind("INITIAL_CHECKPOINT_PATH", place.checkpoint),
        *_corpus_arguments(place),
        bind("EVAL_FILE", place.data / "test.jsonl"),
        bind("PREDICTIONS", found),
        "--gin.EvalConfig.generate=False",
        f"--gin.EvalConfig.recall_at={RECALL_AT}",
    ]
    stages.run("evaluate", evaluate.main, arguments)
    return scores(_read(found))


def _index_arguments(place: Place) -> list[str]:
    return [
        "--gin_file=runs/build_index.gin",
        "--gin_file=corpora/factbook.gin",
        bind("INITIAL_CHECKPOINT_PATH", place.checkpoint),
        bind("PASSAGES", place.data / "passages.jsonl"),
        *_corpus_arguments(place),
    ]


def _train_arguments(place: Place, mode: str, seed: int, bindings: Sequence[str]) -> list[str]:
    return [
        "--gin_file=runs/demo_64shot.gin",
        bind("MODEL_DIR", place.model_dir(mode)),
        bind("INITIAL_CHECKPOINT_PATH", place.checkpoint),
        *_corpus_arguments(place),
        bind("TRAIN_FILE", place.data / factbook.few_shot_name(seed)),
        bind("EVAL_FILE", place.data / "test.jsonl"),
        f"--gin.EvalConfig.recall_at={RECALL_AT}",
        f"--gin.TrainConfig.seed={seed}",
        *MODES[mode],
        *bindings,
    ]


def _ask_again_arguments(
    place: Place, reading: Reading, questions: Path, answers: Path
) -> list[str]:
    """The trained model, reading as it was trained to."""
    return [
        "--gin_file=runs/evaluate.gin",
        bind("INITIAL_CHECKPOINT_PATH", place.model_dir(JOINT) / FINAL),
        *_corpus_arguments(place),
        bind("EVAL_FILE", questions),
        bind("PREDICTIONS", answers),
        f"--gin.K={reading.step.k}",
        f"--gin.TEXT_LENGTH={reading.step.reader_length}",
        f"--gin.QUERY_LENGTH={reading.data.query_length}",
    ]


def _corpus_arguments(place: Place) -> list[str]:
    return [bind("STORE", place.store), bind("INDEX", place.index)]


def _read(path: Path) -> list[Record]:
    return [record for _, record in read_jsonl(path)]


def _predictions(model_dir: Path) -> list[Record]:
    """What the run answered after its last step."""
    return _read(max((model_dir / PREDICTIONS).glob("step_*.jsonl")))


def _present(console: Console, place: Place, results: Results) -> None:
    """Write plot and results file, and print everything."""
    plot, results_file = place.out / "demo.png", place.out / "results.json"
    setup = results.setup
    subtitle = (
        f"{setup['test_questions']:,} questions about {setup['test_countries']} countries · "
        f"{setup['passages']:,} passages of the CIA World Factbook"
    )
    write_plot(plot, results.rows, subtitle)
    write_results(results_file, results)
    console.print()
    show(console, results, plot, results_file)
    console.print(f"time     {results.seconds['all'] / 60:.1f} minutes", highlight=False)
