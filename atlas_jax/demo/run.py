"""The demo: from the World Factbook to answered, scored questions about unseen countries.

Prepares corpus and questions and indexes the corpus with the shipped nano model. 64 questions
teach the reader which value their words mean and the retriever which passage, and then the whole
task in four ways: closed book, with the retriever as shipped, with the taught one, with the taught
one trained along. Each is evaluated on countries that no training question names; at last passages
are swapped, and swapped back: versions 1 and 2 of the corpus.
Everything runs through the same entry points that users run; each command is shown.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from atlas_jax import evaluate, index_command, train_retriever
from atlas_jax.build_index import main as build_index_main
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import read_jsonl, write_jsonl
from atlas_jax.core.paths import check_output_folder
from atlas_jax.core.terminal import expand_arguments
from atlas_jax.demo import commands, factbook
from atlas_jax.demo.bm25 import bm25_recall
from atlas_jax.demo.commands import (
    FIND,
    FIXED,
    JOINT,
    MODES,
    READ,
    ROW_NAMES,
    Lengths,
    Place,
)
from atlas_jax.demo.index_swap import choose, judge
from atlas_jax.demo.paths import nano_checkpoint
from atlas_jax.demo.plot import write_plot
from atlas_jax.demo.report import Results, ScoreRow, Swap, show, write_results
from atlas_jax.demo.results import samples, scores
from atlas_jax.demo.stages import Stages
from atlas_jax.train import main as train_main
from atlas_jax.training.config import PREDICTIONS

MARKER = ".atlas-jax-demo"
SAMPLES = 5
SWAPS = 8

PREPARE = "prepare the World Factbook"
INDEX = "index the corpus with the nano model"
BEFORE = "retrieval before any training question"
SWAP = "swap passages of the index"

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="atlas-jax demo", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", default="work/demo", help="folder for everything it makes")
    parser.add_argument("--checkpoint", help="model folder to begin with (default: nano)")
    parser.add_argument("--seed", type=int, choices=factbook.FEW_SHOT_SEEDS, default=0,
                        help="which 64 questions")  # fmt: skip
    parser.add_argument("bindings", nargs="*", metavar="--gin.NAME=value",
                        help="bindings for the four runs of the whole task")  # fmt: skip
    arguments = expand_arguments(sys.argv[1:] if argv is None else argv)
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
    check_output_folder(out, "--out")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UserError(f"{out} is not empty and not a demo's folder: choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()


def run(place: Place, seed: int, bindings: Sequence[str]) -> Results:
    """Run every stage and show the results."""
    console, start = Console(), time.monotonic()
    stages = Stages(console, [PREPARE, INDEX, BEFORE, READ, FIND, *MODES, SWAP])
    with stages.stage(PREPARE):
        counts = factbook.prepare(place.data)
        stages.say(
            f"{counts['passages.jsonl']:,} passages; {counts['relations']} relations; "
            f"{counts['test.jsonl']:,} test questions"
        )
    passages, test = _read(place.data / "passages.jsonl"), _read(place.data / "test.jsonl")
    with stages.stage(INDEX):
        stages.run("build_index", build_index_main, commands.index(place, FIXED))
    rows = []
    with stages.stage(BEFORE):
        rows += [
            ScoreRow("BM25", bm25_recall(passages, test)),
            ScoreRow("untrained retriever", _untrained(place, stages)),
        ]
        for row in rows:
            stages.say(f"{row.name}: " + ", ".join(f"{k} {v:.1f}" for k, v in row.scores.items()))
    with stages.stage(READ):
        stages.run("train", train_main, commands.teach(place, READ, seed))
    with stages.stage(FIND):
        finding = commands.teach(place, FIND, seed)
        stages.run("train_retriever", train_retriever.main, finding)
        stages.run("build_index", build_index_main, commands.index(place, JOINT))
    for mode in MODES:
        with stages.stage(mode):
            stages.run("train", train_main, commands.train_task(place, mode, seed, bindings))
        rows.append(ScoreRow(ROW_NAMES[mode], scores(_predictions(place.model_dir(mode)))))
    predictions = _predictions(place.model_dir(JOINT))
    reading = Lengths.of_last_run()
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
        samples=samples(predictions, SAMPLES, reading.k),
        swaps=swaps,
        seconds={**stages.seconds, "all": round(time.monotonic() - start, 1)},
    )
    _present(console, place, results)
    return results


def _swap(
    place: Place,
    reading: Lengths,
    predictions: Sequence[Record],
    test: Sequence[Record],
    passages: Sequence[Record],
    stages: Stages,
) -> list[Swap]:
    """Choose passages, swap them as a version of the store, ask again, and swap them back."""
    candidates = choose(predictions, test, {p["id"]: p for p in passages}, SWAPS)
    if not candidates:
        stages.say("no test question was answered rightly from a first-ranked passage: no swap")
        return []
    folder = place.out / "swap"
    new, old = folder / "new.jsonl", folder / "old.jsonl"
    by_id = {passage["id"]: passage for passage in passages}
    write_jsonl(new, (candidate.passage for candidate in candidates))
    write_jsonl(old, (by_id[candidate.passage["id"]] for candidate in candidates))
    stages.run("index", index_command.main, commands.replace(place, new))
    questions, answers = folder / "questions.jsonl", folder / "answers.jsonl"
    write_jsonl(questions, (candidate.row for candidate in candidates))
    stages.run("evaluate", evaluate.main, commands.ask_again(place, reading, questions, answers))
    stages.run("index", index_command.main, commands.replace(place, old))
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
    stages.run("evaluate", evaluate.main, commands.untrained(place, found))
    return scores(_read(found))


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
