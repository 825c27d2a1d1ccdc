"""Runs each step once: a step with a result in its folder is not run again."""

import contextlib
import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from atlas_jax import evaluate, remove_leaks
from atlas_jax.build_index import main as build_index_main
from atlas_jax.claims.steps import Keys, Step, arguments
from atlas_jax.core import strict_json
from atlas_jax.core.config import INTERRUPTED, clear_gin, config_text, load_gin, write_config
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import atomic_text
from atlas_jax.core.preemption import PREEMPTED
from atlas_jax.train import main as train_main
from atlas_jax.training.config import CHECKPOINTS, CONFIG_FILE
from atlas_jax.training.metrics import read_metrics

RESULT_FILE = "result.json"
LOG_FILE = "log.txt"

Result = dict[str, Any]


class Stopped(Exception):
    """The user ended the run; finished work is kept. `code` is the ended command's exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped with exit code {code}")
        self.code = code


class Runner:
    """Runs steps below a folder.

    Attributes:
      keys: of the steps.
      failed: key -> the fault, for steps that failed.
    """

    def __init__(self, folder: Path) -> None:
        """Make a runner that keeps results in `folder`/<key>."""
        self.keys, self.failed = Keys(), dict[str, str]()
        self._folder = folder

    def folder(self, step: Step) -> Path:
        """The folder of the step's configuration, log and work."""
        return self._folder / self.keys.of(step)

    def result(self, step: Step) -> Result | None:
        """The step's result: {command, scores, seconds}; None if it has not finished."""
        path = self.folder(step) / RESULT_FILE
        if not path.is_file():
            return None
        found: Result = strict_json.read(path, dict[str, Any])
        return found

    def missing(self, steps: Iterable[Step]) -> list[Step]:
        """The steps needed for these, each once, in an order in which they can run."""
        found: dict[str, Step] = {}

        def visit(step: Step) -> None:
            if self.keys.of(step) not in found and self.result(step) is None:
                for other in step.needs():
                    visit(other)
                found[self.keys.of(step)] = step

        for step in steps:
            visit(step)
        return list(found.values())

    def run(self, step: Step) -> None:
        """Run one step, whose needs have already run; a failure is noted in `failed`.

        Raises:
          Stopped: it was ended from outside.
        """
        key = self.keys.of(step)
        broken = [n for n in step.needs() if self.result(n) is None]
        if broken:
            names = ", ".join(f"{n.command} {self.keys.of(n)}" for n in broken)
            self.failed[key] = f"needs {names}, which failed"
            return
        folder, start = self.folder(step), time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            scores = self._run(step, folder)
        except UserError as error:
            self.failed[key] = str(error)
            return
        except Stopped:
            raise
        except Exception as error:  # a bug in one row must not stop the others
            with (folder / LOG_FILE).open("a", encoding="utf-8") as log:
                traceback.print_exc(file=log)
            self.failed[key] = f"{type(error).__name__}: {error} (see {folder / LOG_FILE})"
            return
        finally:
            clear_gin()
            jax.clear_caches()  # each step compiles its own programs
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # the model folder stays
        seconds = round(time.monotonic() - start, 1)
        with atomic_text(folder / RESULT_FILE) as file:
            json.dump({"command": step.command, "scores": scores, "seconds": seconds}, file)

    def _run(self, step: Step, folder: Path) -> dict[str, float]:
        """Write the step's gin file, run it, and read what it scored."""
        main, outcome = COMMANDS[step.command]
        flags = arguments(step, self.folder)
        files = [f.removeprefix("--gin_file=") for f in flags if f.startswith("--gin_file=")]
        load_gin(files, [f.removeprefix("--gin.") for f in flags if f.startswith("--gin.")])
        write_config(folder / CONFIG_FILE, config_text())
        log = folder / LOG_FILE
        with log.open("w", encoding="utf-8") as said, contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(said))
            stack.enter_context(contextlib.redirect_stderr(said))
            code = main([f"--gin_file={(folder / CONFIG_FILE).as_posix()}"])
        if code in (INTERRUPTED, PREEMPTED):
            raise Stopped(code)
        lines = log.read_text(encoding="utf-8").splitlines()
        if code:
            raise UserError(f"{next(reversed(lines), 'no word')} (exit code {code}, see {log})")
        return outcome(folder, lines)


def _last_evaluation(folder: Path, lines: Sequence[str]) -> dict[str, float]:
    """What a training run scored at its end; nothing where it evaluated nothing."""
    rows = [row for row in read_metrics(folder) if any(n.startswith("eval/") for n in row)]
    last = rows[-1] if rows else {}
    return {n.removeprefix("eval/"): v for n, v in last.items() if n.startswith("eval/")}


def _printed(folder: Path, lines: Sequence[str]) -> dict[str, float]:
    """The numbers of the JSON object that a command ended with."""
    found = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _nothing(folder: Path, lines: Sequence[str]) -> dict[str, float]:
    return {}


Main = Callable[[Sequence[str]], int]
Outcome = Callable[[Path, Sequence[str]], dict[str, float]]

COMMANDS: dict[str, tuple[Main, Outcome]] = {
    "train": (train_main, _last_evaluation),
    "evaluate": (evaluate.main, _printed),
    "build_index": (build_index_main, _nothing),
    "remove_leaks": (remove_leaks.main, _printed),
}
