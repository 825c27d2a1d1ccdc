"""The paper's claims at a small scale: rows of short runs, a table and a figure.

Each row is a chain of ordinary runs (index, train, evaluate) from a shipped pair, with a gin file
in its folder. Finished runs are not repeated. A row that fails does not stop the others. The table
names rows that have not run. docs/reports/claims.md lists the rows and the content of --data.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from atlas_jax import mini
from atlas_jax.claims import results as results_file
from atlas_jax.claims.bench import Bench
from atlas_jax.claims.data import Data
from atlas_jax.claims.figure import write_figure
from atlas_jax.claims.pairs import MINI, PAIRS, Pair
from atlas_jax.claims.results import Measured, Results, row_name
from atlas_jax.claims.rows import GROUPS, Group, Row, selected
from atlas_jax.claims.runner import Runner, Stopped
from atlas_jax.claims.steps import Step
from atlas_jax.claims.table import judged, page
from atlas_jax.core.compiler import CompilerConfig
from atlas_jax.core.config import INTERRUPTED, USER_ERROR
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import atomic_text
from atlas_jax.core.terminal import expand_arguments
from atlas_jax.demo.factbook import FEW_SHOT_SEEDS
from atlas_jax.demo.paths import nano_checkpoint
from atlas_jax.demo.recipes import shipped

FAILED = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """The work of one call.

    Attributes:
      bench: makes the steps.
      runner: runs them, and knows which have run.
      rows: those to run now.
      seeds: of each row.
      minutes: no step begins after this time; 0 = no limit.
      report: folder of table, figure and JSON.
    """

    bench: Bench
    runner: Runner
    rows: Sequence[tuple[Group, Row]]
    seeds: Sequence[int]
    minutes: float
    report: Path

    @property
    def table(self) -> Path:
        """The page with the rows and the verdicts."""
        return self.report / f"{self.bench.pair.report}.md"

    @property
    def figure(self) -> Path:
        """The page's figure."""
        return self.report / f"{self.bench.pair.report}.png"

    @property
    def json(self) -> Path:
        """The scores measured so far."""
        return self.report / f"{self.bench.pair.report}.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run rows; 0 when all went well, 1 when some failed, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="atlas-jax claims", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", default="", help="groups, or rows as group/row, with commas")
    parser.add_argument("--seeds", type=int, choices=range(1, 1 + len(FEW_SHOT_SEEDS)),
                        default=len(FEW_SHOT_SEEDS), help="how many")  # fmt: skip
    parser.add_argument("--questions", type=int, default=300, help="asked of each row")
    parser.add_argument("--minutes", type=float, default=0, help="begin no run after this")
    parser.add_argument("--data", type=Path, help="folder for the rows that need other data")
    parser.add_argument("--pair", choices=list(PAIRS), default="",
                        help="what every row begins with (default: mini where MiniLM is installed, "
                        "else nano)")  # fmt: skip
    parser.add_argument("--checkpoint", type=Path,
                        help="model folder instead of the pair's, taught as it is")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("work/claims"), help="folder of the runs")
    parser.add_argument(
        "--report", type=Path, default=Path("docs/reports"), help="folder of table, figure and JSON"
    )
    flags = parser.parse_args(expand_arguments(sys.argv[1:] if argv is None else argv))
    try:
        if flags.questions < 1:
            raise UserError(f"--questions {flags.questions}: expected 1 or more")
        if flags.data and not flags.data.is_dir():
            raise UserError(f"--data {flags.data}: no such folder")
        pair = PAIRS[shipped(flags.pair).name]
        plan = Plan(
            bench=Bench(
                Data(flags.out / "data", flags.data, flags.questions),
                flags.checkpoint or _shipped(pair, flags.out),
                pair,
            ),
            runner=Runner(flags.out / "runs"),
            rows=selected(GROUPS, flags.only),
            seeds=FEW_SHOT_SEEDS[: flags.seeds],
            minutes=flags.minutes,
            report=flags.report,
        )
        # The seeds of a row are one program.
        CompilerConfig(cache=str((flags.out / "programs").absolute())).apply()
        return run(plan, GROUPS)
    except (UserError, OSError) as error:
        print(f"claims: error: {error}", file=sys.stderr)
        return USER_ERROR


def _shipped(pair: Pair, out: Path) -> Path:
    """The pair's model folder; the mini pair is put together first."""
    if pair is not MINI:
        return nano_checkpoint()
    folder = out / "mini"
    if not folder.exists() and mini.main([f"--output={folder}"]):
        raise UserError("the mini pair could not be put together (see above)")
    return folder


def run(plan: Plan, groups: Sequence[Group]) -> int:
    """Run what is missing of the plan's rows, then write table and figure of all groups.

    Raises:
      UserError: the checkpoint is not there.
    """
    steps, broken = _steps(plan)
    code = 0
    try:
        _run_missing(plan, steps)
    except Stopped as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = INTERRUPTED
    found = _collect(plan, groups)
    plan.report.mkdir(parents=True, exist_ok=True)
    results_file.write(plan.json, found)
    write_figure(plan.figure, groups, found, plan.bench.pair)
    with atomic_text(plan.table) as file:
        file.write(page(groups, found, plan.bench.pair))
    failures = {**broken, **_failures(plan, steps)}
    _tell(plan, groups, found, failures)
    return code or (FAILED if failures else 0)


def _steps(plan: Plan) -> tuple[dict[str, Step], dict[str, str]]:
    """'group/row seed' -> its step, and -> the fault of its data; missing data is reported."""
    steps: dict[str, Step] = {}
    broken: dict[str, str] = {}
    for group, row in plan.rows:
        name = row_name(group, row)
        if not plan.bench.data.has(row.needs):
            print(f"{name}: needs a folder {row.needs} in --data")
            continue
        for seed in plan.seeds:
            try:
                step = row.step(plan.bench, seed)
                plan.runner.keys.of(step)
                steps[f"{name} seed {seed}"] = step
            except (UserError, OSError) as error:
                broken[f"{name} seed {seed}"] = str(error)
    return steps, broken


def _run_missing(plan: Plan, steps: Mapping[str, Step]) -> None:
    """Run the steps that have no result yet, each under the first row that needs it."""
    runner, end = plan.runner, time.monotonic() + 60 * plan.minutes
    first: dict[str, str] = {}
    for name, step in steps.items():
        for needed in runner.missing([step]):
            first.setdefault(runner.keys.of(needed), name)
    missing = runner.missing(steps.values())
    bar = tqdm(missing, "claims", unit="run", disable=None)
    for number, step in enumerate(bar, 1):
        key = runner.keys.of(step)
        if plan.minutes and time.monotonic() > end:
            bar.write(f"{len(missing) - number + 1} runs are left for the next call")
            break
        what = f"{first[key]}: {step.command}"
        bar.set_description(what)
        bar.write(f"{number}/{len(missing)}  {what}  {runner.folder(step)}")
        runner.run(step)
        result = runner.result(step)
        told = f"{result['seconds']:.0f} s" if result else f"failed: {runner.failed[key]}"
        bar.write(f"{' ' * len(f'{number}/{len(missing)}')}  {told}")


def _failures(plan: Plan, steps: Mapping[str, Step]) -> dict[str, str]:
    """What went wrong, by row and seed."""
    keys = {name: plan.runner.keys.of(step) for name, step in steps.items()}
    failed = plan.runner.failed
    return {name: failed[key] for name, key in keys.items() if key in failed}


def _collect(plan: Plan, groups: Sequence[Group]) -> Results:
    """All results of this call and of earlier calls, if they belong to the same runs."""
    keys: dict[str, dict[int, str]] = {}
    measured: dict[str, dict[int, Measured]] = {}
    for group in groups:
        for row in group.rows:
            if not plan.bench.data.has(row.needs):
                continue
            now = keys.setdefault(row_name(group, row), {})
            found = measured.setdefault(row_name(group, row), {})
            for seed in FEW_SHOT_SEEDS:
                try:
                    step = row.step(plan.bench, seed)
                    now[seed] = plan.runner.keys.of(step)
                except (UserError, OSError):
                    continue  # told already, if it was to be run
                result = plan.runner.result(step)
                if result is not None:
                    found[seed] = Measured(now[seed], result["scores"])
    present = Results(
        checkpoint=plan.runner.keys.of_path(plan.bench.checkpoint),
        questions=plan.bench.data.questions,
        measured={name: seeds for name, seeds in measured.items() if seeds},
        versions=results_file.versions(),
    )
    return results_file.merged(results_file.read(plan.json), present, keys)


def _tell(plan: Plan, groups: Sequence[Group], found: Results, failures: Mapping[str, str]) -> None:
    """Print the groups' verdicts, the failures, and the place of the table."""
    asked = {group.name for group, _ in plan.rows}
    for group in (group for group in groups if group.name in asked):
        print(f"\n{group.title}")
        for claim in group.claims:
            verdict = judged(group, claim, found)
            difference = "" if verdict.difference is None else f" ({verdict.difference:+.1f})"
            relation = "more than" if claim.expects == "more" else "like"
            print(f"  {verdict.verdict:9}  {claim.row} {relation} {claim.against}{difference}")
    for name, problem in failures.items():
        print(f"claims: error: {name}: {problem}", file=sys.stderr)
    print(f"\n{plan.table}, {plan.figure}, {plan.json}")
