"""The few-shot methods side by side, from one encoder: scores, trained parameters, verdicts.

    python -m benchmarks.fewshot --encoder=work/encoder --data=fewshot [--before=work/minilm]
    python -m benchmarks.fewshot --report=docs/reports/fewshot.md   # draws the page anew

--data has a folder for each task with train_{10,30}shot_seed{1..5}.jsonl, test.jsonl and
unlabelled.jsonl, plain or .gz. The seed of the data is the seed of the run, so rows are paired.
A run that is done is not done again: --results keeps it (`benchmarks.kept`), by what decides it
and no path, so a table can grow over many calls and machines. Seeds are the outer loop, so a call
that --minutes ends leaves whole seeds.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.claims.verdict import RULE, Expects, judge, summarise
from atlas_jax.core.compiler import CompilerConfig
from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import plain_or_gz, read_jsonl, write_jsonl
from atlas_jax.models.encoder_folder import Encoder, load_encoder, merged, save_encoder
from atlas_jax.models.fingerprint import model_hash
from atlas_jax.models.folder import read_about, read_folder_config
from atlas_jax.tasks.classification import ClassificationTask, RTETask, SST2Task
from atlas_jax.training.classifier_config import ClassifierRun, ClassifierTrainConfig
from atlas_jax.training.classifier_trainer import train_classifier
from atlas_jax.training.config import FINAL, OptimizerConfig
from atlas_jax.training.pet import pet
from atlas_jax.training.pet_config import PetConfig, PetRun
from atlas_jax.training.provenance import file_mark
from atlas_jax.training.self_training import self_train
from atlas_jax.training.self_training_config import SelfTrainConfig, SelfTrainingRun
from benchmarks.kept import Kept, Wanted, begun, key_of, put_between, read, run_missing

RESULTS = Path("docs/reports/fewshot.json")
TASKS: dict[str, type[ClassificationTask]] = {"sst2": SST2Task, "rte": RTETask}
LENGTHS = {"sst2": 64, "rte": 128}
# PET's, where they go with the task's words (pet: pvp.py).
PATTERNS = {
    "sst2": (
        "{text} It was {mask} .",
        "It was {mask} . {text}",
        "{text} All in all, it was {mask} .",
    ),
    "rte": (
        "{premise!drop} ? {mask} , {hypothesis!lower}",
        '" {hypothesis} " ? {mask} . " {premise} "',
        "{hypothesis!drop} ? {mask} , {premise}",
    ),
}
DELTAS = {
    "": DeltaConfig(),
    "adapters": DeltaConfig(kind="adapter", rank=64),
    "LoRA": DeltaConfig(kind="lora", rank=8),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      method: of `train_classifier`, or 'self-training' or 'pet'.
      delta: a name of DELTAS.
      trains: whether it takes steps.
      weighted: of self-training.
      before: begin with --before, the encoder as it was before it read the tasks' texts.
    """

    method: str
    delta: str = ""
    trains: bool = True
    weighted: bool = False
    before: bool = False


ROWS = {
    "majority": Row("majority", trains=False),
    "probe": Row("probe", trains=False),
    "probe, before": Row("probe", trains=False, before=True),
    "classic, before": Row("head", before=True),
    "classic": Row("head"),
    "classic, adapters": Row("head", "adapters"),
    "prompt, zero-shot": Row("prompt", trains=False),
    "prompt": Row("prompt"),
    "prompt, adapters": Row("prompt", "adapters"),
    "prompt, LoRA": Row("prompt", "LoRA"),
    "PET": Row("pet"),
    "self-training, no weights": Row("self-training", "adapters"),
    "self-training": Row("self-training", "adapters", weighted=True),
}

# What the papers say, as (text, row, row, relation).
CLAIMS: tuple[tuple[str, str, str, Expects], ...] = (
    ("the prompt knows the task", "prompt, zero-shot", "majority", "more"),
    ("text of the task helps a classifier without a prompt", "classic", "classic, before", "more"),
    ("a prompt beats a classifier", "prompt", "classic", "more"),
    ("so it does with adapters", "prompt, adapters", "classic, adapters", "more"),
    ("adapters equal full tuning", "prompt, adapters", "prompt", "alike"),
    ("LoRA equals full tuning", "prompt, LoRA", "prompt", "alike"),
    ("several prompts beat one", "PET", "prompt", "more"),
    ("self-training beats its prompt", "self-training", "prompt, adapters", "more"),
    ("weights help", "self-training", "self-training, no weights", "more"),
)


@dataclasses.dataclass(frozen=True)
class Bench:
    """The settings that all rows share.

    Attributes:
      unlabelled: how many texts the members of PET label; 0 = all.
    """

    encoder: str
    before: str
    data: str
    out: str
    questions: int
    length: int
    unlabelled: int
    steps: int
    batch_size: int
    rate: float
    small_rate: float
    rounds: int
    round_steps: tuple[int, int, int]

    def decides(self) -> dict[str, Any]:
        """The settings without paths: of the two encoders what is in their folders.

        An encoder that no row begins with has "".
        """
        own = dataclasses.asdict(self)
        for name in ("data", "out"):
            del own[name]
        for name in ("encoder", "before"):
            if own[name]:
                found = loaded(own[name], self.before)
                own[name] = model_hash(found.params, found.tokenizer)[:16]
        return own

    def file(self, task: str, name: str) -> str:
        """A file of a task, plain or .gz."""
        path = Path(self.data) / task / f"{name}.jsonl"
        if found := plain_or_gz(path):
            return str(found)
        raise UserError(f"{path}: no such file, plain or .gz")

    def test(self, task: str) -> str:
        """The texts that are asked: all, or a draw that is the same for every row."""
        path = Path(self.out) / f"{task}_test_{self.questions}.jsonl"
        if not path.is_file():
            rows = [row for _, row in read_jsonl(self.file(task, "test"))]
            chosen = np.random.default_rng(0).permutation(len(rows))[: self.questions or len(rows)]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(path, [rows[number] for number in sorted(chosen)])
        return str(path)


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: a row of a task with a number of labelled lines and a seed."""

    task: str
    shots: int
    seed: int
    row: str

    @property
    def key(self) -> str:
        """Its name among the results."""
        return f"{self.task}/{self.shots}/{self.seed}/{self.row}"

    def decided_by(self, bench: Bench) -> str:
        """A key of its data, its method and how it is asked; the settings are beside all runs."""
        row, task = ROWS[self.row], TASKS[self.task]()
        words = {str(label): list(own) for label, own in task.verbaliser.words.items()}
        names = [f"train_{self.shots}shot_seed{self.seed}", "test"]
        if row.method in ("self-training", "pet"):
            names.append("unlabelled")
        marks = [file_mark(bench.file(self.task, name)) for name in names]
        patterns = PATTERNS[self.task] if row.method == "pet" else ()
        delta = dataclasses.asdict(DELTAS[row.delta])
        return key_of(dataclasses.asdict(row), delta, task.query_format, words, marks, patterns)


def run_case(bench: Bench, case: Case) -> dict[str, float]:
    """Accuracy from 0 to 1, of how many texts, seconds, and trained and all parameters."""
    row, task = ROWS[case.row], TASKS[case.task]()
    folder = Path(bench.out) / "runs" / case.key.replace("/", "_").replace(", ", "_")
    common: dict[str, Any] = {
        "model_dir": str(folder),
        "encoder": bench.before if row.before else bench.encoder,
        "task": case.task,
        "file": bench.file(case.task, f"train_{case.shots}shot_seed{case.seed}"),
        "eval_file": bench.test(case.task),
        "length": bench.length or LENGTHS[case.task],
        "seed": case.seed,
    }
    began = time.perf_counter()
    train = {"self-training": _self_training, "pet": _pet}.get(row.method, _classifier)
    scores = train(bench, row, task, common)
    seconds = time.perf_counter() - began
    texts = sum(1 for _ in read_jsonl(common["eval_file"]))
    found = {"accuracy": scores["accuracy"], "texts": float(texts), "seconds": seconds}
    if (folder / FINAL).is_dir():
        about = read_about(folder / FINAL)
        found |= {name: float(about[name]) for name in ("trained", "parameters")}
    return found


def _classifier(
    bench: Bench, row: Row, task: ClassificationTask, common: dict[str, Any]
) -> dict[str, float]:
    steps = bench.steps if row.trains else 0
    config = ClassifierTrainConfig(
        **common, method=row.method,  # type: ignore[arg-type]  # self-training is not told here
        total_steps=steps, batch_size=bench.batch_size,
    )  # fmt: skip
    rate = bench.small_rate if row.delta else bench.rate
    optimizer = OptimizerConfig(learning_rate=rate, total_steps=max(steps, 1), weight_decay=0.0)
    return train_classifier(
        ClassifierRun(task=task, train=config, delta=DELTAS[row.delta], optimizer=optimizer)
    )


def _self_training(
    bench: Bench, row: Row, task: ClassificationTask, common: dict[str, Any]
) -> dict[str, float]:
    kd, meta, tune = bench.round_steps
    config = SelfTrainConfig(
        **common, unlabelled_file=bench.file(task.name, "unlabelled"),
        teacher_steps=bench.steps, rounds=bench.rounds, kd_steps=kd, meta_steps=meta,
        tune_steps=tune, weighted=row.weighted, batch_size=bench.batch_size,
        meta_batch_size=bench.batch_size, teacher_learning_rate=bench.small_rate,
        student_learning_rate=bench.small_rate,
    )  # fmt: skip
    return self_train(SelfTrainingRun(task=task, train=config, delta=DELTAS[row.delta]))


def _pet(
    bench: Bench, row: Row, task: ClassificationTask, common: dict[str, Any]
) -> dict[str, float]:
    """A member for each pattern; the classifier has as many steps as self-training's students."""
    config = PetConfig(
        **common, unlabelled_file=bench.file(task.name, "unlabelled"),
        unlabelled_rows=bench.unlabelled, patterns=PATTERNS[task.name], seeds=1,
        steps=bench.steps, batch_size=bench.batch_size,
        learning_rate=bench.small_rate if row.delta else bench.rate,
        distil_steps=max(1, bench.rounds * sum(bench.round_steps)),
    )  # fmt: skip
    optimizer = OptimizerConfig(weight_decay=0.0)
    return pet(PetRun(task=task, train=config, delta=DELTAS[row.delta], optimizer=optimizer))


def loaded(folder: str, before: str) -> Encoder:
    """An encoder; where its folder holds a part, it is a part of `before`."""
    partial = read_folder_config(Path(folder)).bases
    return load_encoder(folder, base=before if partial else "")


def plain(folder: str, before: str, out: Path) -> str:
    """The folder of an encoder; merged into `out` where it has LoRA, since rows bring their own.

    Raises:
      UserError: it has adapters, which cannot be merged.
    """
    found = loaded(folder, before)
    if not found.deltas:
        return folder
    save_encoder(out, merged(found))
    return str(out)


def cases(
    tasks: Sequence[str], shots: Sequence[int], seeds: int, rows: Sequence[str]
) -> list[Case]:
    """All runs, a whole seed after the other."""
    return [
        Case(task, few, seed, row)
        for task in tasks for few in shots for seed in range(1, 1 + seeds) for row in rows
    ]  # fmt: skip


def wanted(bench: Bench, every: Sequence[Case]) -> Iterator[Wanted]:
    """The runs, each with what decides it."""
    for case in every:
        run = functools.partial(run_case, bench, case)
        yield Wanted(case.key, case.decided_by(bench), run)


def values(runs: dict[str, dict[str, float]], task: str, shots: int, row: str) -> dict[int, float]:
    """Seed -> accuracy in percent."""
    found = {}
    for key, one in runs.items():
        in_task, few, seed, name = key.split("/")
        if (in_task, int(few), name) == (task, shots, row):
            found[int(seed)] = 100 * one["accuracy"]
    return dict(sorted(found.items()))


def table(runs: dict[str, dict[str, float]], task: str, shots: int) -> Iterator[str]:
    """Scores of a task: mean and population standard deviation over the seeds."""
    yield "| row | accuracy | by seed | trained | seconds |"
    yield "|---|---|---|---|---|"
    for row in ROWS:
        own = values(runs, task, shots, row)
        if not own:
            yield f"| {row} | not run | | | |"
            continue
        ones = [runs[f"{task}/{shots}/{seed}/{row}"] for seed in own]
        spread = f"{statistics.fmean(own.values()):.1f} ({statistics.pstdev(own.values()):.1f})"
        seconds = statistics.fmean(one["seconds"] for one in ones)
        yield (
            f"| {row} | {spread} | {', '.join(f'{value:.1f}' for value in own.values())} "
            f"| {_trained(ones[0])} | {seconds:.0f} |"
        )


def _trained(one: dict[str, float]) -> str:
    if "trained" not in one:
        return "–"
    return f"{one['trained']:,.0f} ({100 * one['trained'] / one['parameters']:.1f} %)"


def verdicts(
    runs: dict[str, dict[str, float]], task: str, shots: int, questions: int
) -> Iterator[str]:
    """The rule on each claim, over the seeds that both rows have."""
    yield "| claim | row | expected to be | difference | counts above | verdict |"
    yield "|---|---|---|---|---|---|"
    for text, row, against, expects in CLAIMS:
        one, other = (values(runs, task, shots, name) for name in (row, against))
        both = sorted(one.keys() & other.keys())
        ours, theirs = (summarise([side[seed] for seed in both]) for side in (one, other))
        found = judge(ours, theirs, expects, 100 / questions)
        difference = "" if found.difference is None else f"{found.difference:+.1f}"
        threshold = "" if found.threshold is None else f"{found.threshold:.1f}"
        relation = "more than" if expects == "more" else "like"
        yield (
            f"| {text} | {row} | {relation} {against} | {difference} | {threshold} "
            f"| **{found.verdict}** |"
        )


def page(kept: Kept) -> str:
    """The report: settings, and for each task and number of labelled lines scores and verdicts."""
    runs = {name: one.figures for name, one in kept.runs.items()}
    lines = [
        "**Rule.** " + RULE.replace("question", "text"),
        "",
        textwrap.fill(f"**Runs.** {_told(kept)}", 100),
    ]
    groups = {(task, int(shots)) for task, shots, *_ in (name.split("/") for name in runs)}
    order = list(TASKS)
    for task, shots in sorted(groups, key=lambda one: (order.index(one[0]), -one[1])):
        own = [one for name, one in runs.items() if name.startswith(f"{task}/{shots}/")]
        asked = int(own[0]["texts"])
        lines += ["", f"## {task}, {shots} labelled lines, {asked} test texts", ""]
        lines += [*table(runs, task, shots), "", *verdicts(runs, task, shots, asked)]
    return "\n".join(lines) + "\n"


def _told(kept: Kept) -> str:
    own: Mapping[str, Any] = kept.settings
    kd, meta, tune = own["round_steps"]
    rounds = f"{own['rounds']} round{'s' if own['rounds'] > 1 else ''} of {kd} + {meta} + {tune}"
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(kept.versions.items()))
    return (
        f"{own['steps']} steps of {own['batch_size']} texts; rate {own['rate']:g}, of adapters and "
        f"LoRA {own['small_rate']:g}; self-training: a teacher of {own['steps']} steps, then "
        f"{rounds}; PET: one member a pattern, then as many "
        "steps as all rounds. Accuracy in percent: mean (population "
        "standard deviation). The rule takes the sample's deviation, over the seeds that both rows "
        f"have.{f' Computed with {libraries}.' if libraries else ''}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and print the report; 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--encoder", default="", help="folder with an MLM head; '' = no run")
    parser.add_argument("--before", default="", help="the same encoder before it read the texts")
    parser.add_argument("--data", default="", help="folder of the tasks' folders")
    parser.add_argument("--out", default="work/fewshot", help="folder of the runs' models")
    parser.add_argument("--results", default=str(RESULTS), help="file that keeps their figures")
    parser.add_argument("--report", default="", help="page to put the tables into")
    parser.add_argument("--tasks", default="sst2,rte")
    parser.add_argument("--shots", default="30,10")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--rows", default="", help="names of rows with ; between, all by default")
    parser.add_argument("--minutes", type=float, default=0, help="begin no run after this")
    parser.add_argument("--questions", type=int, default=0, help="test texts; 0 = all")
    parser.add_argument("--length", type=int, default=0, help="tokens; 0 = of the task")
    parser.add_argument("--unlabelled", type=int, default=0, help="that PET labels; 0 = all")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rate", type=float, default=5e-5, help="where the encoder trains")
    parser.add_argument("--small_rate", type=float, default=1e-3, help="of adapters and LoRA")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round_steps", default="150,100,100", help="kd,meta,tune")
    flags = parser.parse_args(argv)
    try:
        return _run(flags)
    except UserError as error:
        print(f"fewshot: error: {error}", file=sys.stderr)
        return 2


def _run(flags: argparse.Namespace) -> int:
    kd, meta, tune = (int(one) for one in flags.round_steps.split(","))
    names = [field.name for field in dataclasses.fields(Bench) if field.name != "round_steps"]
    bench = Bench(**{name: getattr(flags, name) for name in names}, round_steps=(kd, meta, tune))
    rows = flags.rows.split(";") if flags.rows else list(ROWS)
    rows = [row for row in rows if bench.before or row not in ROWS or not ROWS[row].before]
    tasks, shots = flags.tasks.split(","), [int(one) for one in flags.shots.split(",")]
    for given, known in ((rows, ROWS), (tasks, TASKS)):
        unknown = [one for one in given if one not in known]
        if unknown:
            raise UserError(f"{unknown[0]!r} is unknown; there is {', '.join(known)}")
    results = Path(flags.results)
    if bench.encoder:
        out = Path(flags.out)
        CompilerConfig(cache=str((out / "programs").absolute())).apply()
        # Of the encoder before LoRA is merged, which machines round in different ways.
        kept: Kept | None = begun(results, bench.decides())
        assert kept is not None
        bench = dataclasses.replace(
            bench, encoder=plain(bench.encoder, bench.before, out / "encoder")
        )
        every = cases(tasks, shots, flags.seeds, rows)
        kept = run_missing(results, kept, wanted(bench, every), flags.minutes)
    else:
        kept = read(results)
    if kept is None or not kept.runs:
        raise UserError(f"{results} has no runs yet; give --encoder and --data to make some")
    text = page(kept)
    print(text)
    if flags.report:
        put_between(Path(flags.report), text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
