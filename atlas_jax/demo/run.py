"""The demo: from a corpus to answered, scored questions that training has not seen.

Without options the corpus is the World Factbook, and the questions are about countries that no
training question names. It is indexed as it is. A lesson asks in the words of 64 questions for
values of other titles. Then the 64 questions themselves train: without passages, with the retriever
as it came, and with the retriever trained along, from the answers alone. Last, passages are
changed and changed back, versions 1 and 2 of the corpus, and are asked about in between.
Everything runs through the same entry points that users run; each command is shown.
"""

import argparse
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from atlas_jax import evaluate, index_command, mini, train_retriever
from atlas_jax.build_index import main as build_index_main
from atlas_jax.core.compiler import CompilerConfig
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import JsonObject, read_jsonl, write_jsonl
from atlas_jax.core.paths import check_output_folder
from atlas_jax.core.terminal import expand_arguments
from atlas_jax.demo import factbook
from atlas_jax.demo.bm25 import bm25_recall
from atlas_jax.demo.commands import FIND, READ, ROW_NAMES, Commands, Place
from atlas_jax.demo.corpora import Prepare, own_files, squad_files, world_factbook
from atlas_jax.demo.index_swap import choose, judge
from atlas_jax.demo.paths import nano_checkpoint
from atlas_jax.demo.plot import write_plot
from atlas_jax.demo.recipes import CLOSED, FIXED, JOINT, MINI, NANO, RECIPES, Recipe, shipped
from atlas_jax.demo.report import Results, ScoreRow, Swap, show, write_results
from atlas_jax.demo.results import best_read, samples, scores
from atlas_jax.demo.stages import Stages
from atlas_jax.train import main as train_main

MARKER = ".atlas-jax-demo"
SAMPLES = 5
SWAPS = 8

PREPARE = "prepare corpus and questions"
INDEX = "index the corpus"
BEFORE = "retrieval before any training question"
ASK = "ask"
SWAP = "change passages of the index"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="atlas-jax demo", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--out", default="work/demo", help="folder for everything it makes")
    add("--pair", choices=list(RECIPES), default="",
        help="the shipped pair to begin with (default: mini where MiniLM is installed, else nano)"
    )  # fmt: skip
    add("--checkpoint", help="model folder to begin with, taught as --pair is; instead of it")
    add("--seed", type=int, choices=factbook.FEW_SHOT_SEEDS, default=0, help="which 64 questions")
    add("--count", type=int, default=-1, help="questions to ask, 0 = all (default: by the pair)")
    add("--corpus", choices=("factbook", "squad"), default="factbook", help="what is read")
    add("--data", help="folder with passages, train_64shot and test of --corpus=squad")
    add("--passages", help="a corpus of your own, jsonl {id, title, text}; needs --questions")
    add("--questions", help="jsonl {question, answers}: 64 of them train, the others are asked")
    add("bindings", nargs="*", metavar="--gin.NAME=value",
        help="bindings for the runs that train on the questions themselves")  # fmt: skip
    arguments = expand_arguments(sys.argv[1:] if argv is None else argv)
    bindings = [a for a in arguments if a.startswith("--gin.")]
    options = parser.parse_args([a for a in arguments if not a.startswith("--gin.")])
    try:
        source = _source(options)
        own = options.checkpoint is not None
        recipe = RECIPES[options.pair or NANO.name] if own else shipped(options.pair)
        if options.count >= 0:
            recipe = dataclasses.replace(recipe, asked=options.count)
        place = Place(Path(options.out), _checkpoint(options, recipe))
        clear(place.out)
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # many of the runs share programs
            CompilerConfig(cache=str((place.out / "programs").absolute())).apply()
        run(place, recipe, source, options.seed, bindings, make=not own)
    except (UserError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    return 0


def _source(options: argparse.Namespace) -> Prepare:
    """What is read and asked.

    Raises:
      UserError: options that do not go together.
    """
    if bool(options.passages) != bool(options.questions):
        raise UserError("--passages and --questions go together: name both, or neither")
    if options.passages:
        if options.corpus != "factbook" or options.data:
            raise UserError("--passages is a corpus of its own: leave out --corpus and --data")
        return own_files(Path(options.passages), Path(options.questions))
    if options.corpus == "squad":
        if not options.data:
            raise UserError("--corpus=squad: name the folder with its files by --data")
        return squad_files(Path(options.data))
    if options.data:
        raise UserError("--data goes with --corpus=squad; the Factbook comes with the package")
    return world_factbook


def _checkpoint(options: argparse.Namespace, recipe: Recipe) -> Path:
    if options.checkpoint:
        return Path(options.checkpoint)
    return Path(options.out) / "mini" if recipe.name == MINI.name else nano_checkpoint()


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


def run(
    place: Place,
    recipe: Recipe,
    source: Prepare,
    seed: int,
    bindings: Sequence[str],
    make: bool = True,
) -> Results:
    """Run every stage and show the results.

    Args:
      make: whether the mini pair still has to be put together.
    """
    console, start = Console(), time.monotonic()
    lessons = [name for name, file in ((READ, recipe.lesson), (FIND, recipe.find)) if file]
    if source is not world_factbook:
        lessons = []
    stages = Stages(console, [PREPARE, INDEX, BEFORE, *lessons, *recipe.modes, ASK, SWAP])
    with stages.stage(PREPARE):
        if make and recipe.name == MINI.name:
            stages.run("mini", mini.main, [f"--output={place.checkpoint}"])
        asked = source(place.data, seed, recipe.asked)
        passages, test = _read(asked.passages), _read(asked.asked)
        stages.say(f"{len(passages):,} passages; {len(test):,} questions to ask")
    commands = Commands(place, recipe, asked, seed)
    with stages.stage(INDEX):
        stages.run("build_index", build_index_main, commands.index(FIXED))
    with stages.stage(BEFORE):
        rows = [
            ScoreRow("BM25", bm25_recall(passages, test)),
            ScoreRow("untrained retriever", _untrained(place, commands, stages)),
        ]
        for row in rows:
            stages.say(f"{row.name}: " + ", ".join(f"{k} {v:.1f}" for k, v in row.scores.items()))
    for lesson in lessons:
        with stages.stage(lesson):
            _teach(lesson, commands, stages)
    for mode in recipe.modes:
        with stages.stage(mode):
            stages.run("train", train_main, commands.train(mode, bindings))
    with stages.stage(ASK):
        rows += [_asked(mode, commands, stages) for mode in recipe.modes]
    read = best_read(rows[-1].scores, recipe.reads)
    predictions = _read(_answers(place, JOINT, read))
    with stages.stage(SWAP):
        swaps = _swap(commands, read, predictions, test, passages, stages)
    results = Results(
        setup={
            "checkpoint": str(place.checkpoint),
            "pair": recipe.name,
            "corpus": asked.name,
            "seed": seed,
            "passages": len(passages),
            "train_questions": len(_read(asked.few)),
            "test_questions": len(test),
            "about": asked.about,
            "reads": recipe.reads,
        },
        rows=rows,
        samples=samples(predictions, SAMPLES, read, seed),
        swaps=swaps,
        seconds={**stages.seconds, "all": round(time.monotonic() - start, 1)},
    )
    _present(console, place, results)
    return results


def _teach(lesson: str, commands: Commands, stages: Stages) -> None:
    """One of the two lessons. After that of the retriever the corpus is indexed anew."""
    if lesson == READ:
        stages.run("train", train_main, commands.teach(READ))
        return
    stages.run("train_retriever", train_retriever.main, commands.teach(FIND))
    stages.run("build_index", build_index_main, commands.index(JOINT))


def _answers(place: Place, mode: str, k: int) -> Path:
    return place.model_dir(mode) / f"answers_from_{k}.jsonl"


def _asked(mode: str, commands: Commands, stages: Stages) -> ScoreRow:
    """Ask one trained model with each number of passages; its row of the table."""
    found: dict[str, float] = {}
    for k in (0,) if mode == CLOSED else commands.recipe.reads:
        answers = _answers(commands.place, mode, k)
        arguments = commands.ask(mode, k, commands.asked.asked, answers)
        stages.run("evaluate", evaluate.main, arguments)
        found |= scores(_read(answers), k)
    return ScoreRow(ROW_NAMES[mode], found)


def _swap(
    commands: Commands,
    k: int,
    predictions: Sequence[JsonObject],
    test: Sequence[JsonObject],
    passages: Sequence[JsonObject],
    stages: Stages,
) -> list[Swap]:
    """Choose passages, change them as a version of the store, ask again, and change them back."""
    by_id = {passage["id"]: passage for passage in passages}
    candidates = choose(predictions, test, by_id, SWAPS)
    if not candidates:
        stages.say("no first-ranked passage gave a right answer: there is nothing to change")
        return []
    folder = commands.place.out / "swap"
    new, old = folder / "new.jsonl", folder / "old.jsonl"
    write_jsonl(new, (candidate.passage for candidate in candidates))
    write_jsonl(old, (by_id[candidate.passage["id"]] for candidate in candidates))
    stages.run("index", index_command.main, commands.replace(new))
    questions, answers = folder / "questions.jsonl", folder / "answers.jsonl"
    write_jsonl(questions, (candidate.row for candidate in candidates))
    again = commands.ask(JOINT, k, questions, answers, changed=True)
    stages.run("evaluate", evaluate.main, again)
    stages.run("index", index_command.main, commands.replace(old))
    after = {row["id"]: row["prediction"] for row in _read(answers)}
    swaps = judge(candidates, after)
    for swap in swaps:
        stages.say(f"{'✓' if swap.follows else '✗'} {swap.question}")
        stages.say(f"  passage: {swap.old_value} → {swap.new_value}")
        stages.say(f"  answer:  {swap.answer_before} → {swap.answer_after}")
    return swaps


def _untrained(place: Place, commands: Commands, stages: Stages) -> dict[str, float]:
    """Recall of the shipped retriever."""
    found = place.out / "before" / "retrieved.jsonl"
    stages.run("evaluate", evaluate.main, commands.untrained(found))
    return scores(_read(found))


def _read(path: Path) -> list[JsonObject]:
    return [record for _, record in read_jsonl(path)]


def _present(console: Console, place: Place, results: Results) -> None:
    """Write plot and results file, and print everything."""
    plot, results_file = place.out / "demo.png", place.out / "results.json"
    setup = results.setup
    subtitle = (
        f"{setup['test_questions']:,} questions {setup['about']} · "
        f"{setup['passages']:,} passages of {setup['corpus']}"
    )
    write_plot(plot, results.rows, setup["reads"], subtitle)
    write_results(results_file, results)
    console.print()
    show(console, results, plot, results_file)
    console.print(f"time     {results.seconds['all'] / 60:.1f} minutes", highlight=False)
    console.print("ask it   make explore", highlight=False)
