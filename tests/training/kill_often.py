"""Kills a small training run again and again, at random moments, and says what was left.

    python -m tests.training.kill_often FOLDER KILLS SEED SERIES      (FOLDER holds run.gin)

SERIES is `closed_book` or `rolling`: retrieval in the loop, and an index that is refreshed in
slices and at times as a whole. One process imports everything and forks a life at a time, which
costs a fraction of a start. Each life reads every checkpoint that it finds, not the newest alone,
and the index of each. Prints one JSON object: the lives, the checkpoints read and hashes of the
state at the end and of an uninterrupted run's.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atlas_jax import from_gin
from atlas_jax.core.config import load_gin
from atlas_jax.core.preemption import PREEMPTED, Preempted
from atlas_jax.training import trainer
from atlas_jax.training.checkpoint import Checkpointer, Restored
from atlas_jax.training.metrics import read_metrics

EVERY, KEEP = 3, 2
NO_END = 1_000_000
BINDINGS = [
    f"CheckpointConfig.every={EVERY}",
    f"CheckpointConfig.keep={KEEP}",
    "EvalConfig.file=''",
    "DataConfig.batch_size=2",
    "DataConfig.query_length=16",
    "DataConfig.target_length=4",
    "StepConfig.reader_length=24",
]
SERIES = {
    "closed_book": ["TrainConfig.passages='none'", "StepConfig.retriever_training='fixed'"],
    # Every other checkpoint holds the index itself, the next one the version just made as a whole.
    "rolling": [
        "StepConfig.retriever_training='joint'",
        "StepConfig.k=2",
        "CorpusConfig.dtype='int8'",
        "RefreshPolicy.rolling_rows=3",
        "RefreshPolicy.schedule='2'",
        "StalenessConfig.every=3",
        "StalenessConfig.passages=8",
        "StalenessConfig.k=2",
        "MeshConfig.data=1",
        "MeshConfig.fsdp=2",
    ],
}


def live(folder: Path, series: str, run: str, steps: int) -> int:
    """Fork a life that trains up to `steps`; its process id."""
    child = os.fork()
    if child:
        return child
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    code = 1
    try:  # as a new process would begin
        paths = [f"TrainConfig.model_dir='{folder / run}'", f"TrainConfig.total_steps={steps}"]
        load_gin([str(folder / "run.gin")], [*BINDINGS, *SERIES[series], *paths])
        _read_all_checkpoints(folder / f"{run}.read", folder / f"{run}.indexes")
        state = trainer.train(from_gin.train_run())
        (folder / f"{run}.hash").write_text(state_hash(state))
        code = 0
    except Preempted:
        code = PREEMPTED
    finally:
        os._exit(code)


def _read_all_checkpoints(noted: Path, indexes: Path) -> None:
    """Let this process restore all checkpoints of its run where it would restore the newest.

    Notes the steps of those that could be read, a line for each life, and for each life the
    versions of their indexes and whether the checkpoint held the embeddings; it ends at another.
    """
    newest, load_index = Checkpointer.restore, trainer._load_index
    found: list[Restored] = []

    def every(self: Checkpointer, template: Any, step: int | None = None) -> Restored | None:
        restored = [newest(self, template, saved) for saved in self.steps()]
        found.extend(one for one in restored if one)
        _add_line(noted, [one.step for one in found])
        return found[-1] if found else None

    def every_index(run: Any, params: Any, last: Restored | None) -> None:
        for one in found or [None]:
            load_index(run, params, one)
        notes = [one.notes["index"] for one in found]
        _add_line(indexes, [[one["version"], "rolling" in one] for one in notes])

    Checkpointer.restore = every  # type: ignore[method-assign]
    trainer._load_index = every_index


def _add_line(path: Path, value: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def state_hash(state: Any) -> str:
    """SHA-256 of every array of the state."""
    import jax

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(state)):
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def finish(folder: Path, series: str, run: str, steps: int) -> str:
    """The hash of the state of a life that is left alone."""
    _, status = os.waitpid(live(folder, series, run, steps), 0)
    assert status == 0, status
    return (folder / f"{run}.hash").read_text()


def last_step(run: Path) -> int:
    """The last step taken; the staleness meter's row comes before its step."""
    return max(trained_steps(run), default=0)


def trained_steps(run: Path) -> list[int]:
    """Steps of the rows of losses."""
    return [int(row["step"]) for row in read_metrics(run) if "train/skipped" in row]


def complete(run: Path) -> list[int]:
    """Steps of the checkpoints that are there, by their names."""
    folder = run / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def wait_for_a_step(run: Path, child: int) -> None:
    """Wait until the present life has taken one.

    It begins by taking away the rows behind its checkpoint, then adds its own.
    """
    least = last_step(run)

    def taken() -> bool:
        nonlocal least
        now = last_step(run)
        least = min(least, now)
        return now > least

    wait_until(taken, child, f"no step after step {least}")


def wait_for_a_checkpoint(run: Path, child: int) -> None:
    """Wait until the present life has completed one."""
    before = max(complete(run), default=0)
    newer = f"no checkpoint after {before}"
    wait_until(lambda: max(complete(run), default=0) > before, child, newer)


def wait_until(done: Callable[[], bool], child: int, failure: str) -> None:
    for _ in range(60_000):
        if done():
            return
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        assert ended is None, f"the life ended by itself ({ended.si_status}): {failure}"
        time.sleep(0.01)
    raise TimeoutError(failure)


def main() -> None:
    """See the head of this file."""
    folder, kills, series = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[4]
    draw, run = random.Random(int(sys.argv[3])), folder / "killed"
    lives = []
    for number in range(kills):
        child = live(folder, series, "killed", NO_END)
        if number % 5 == 0:  # also while it starts and restores
            time.sleep(draw.uniform(0, 2.0))
        else:  # two of five get on by a checkpoint, however slow the machine is
            (wait_for_a_checkpoint if number % 2 else wait_for_a_step)(run, child)
            time.sleep(draw.uniform(0, 0.25))
        noted = complete(run)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the life ended by itself: {status}"
        lives.append({"step": last_step(run), "complete": noted, "left": complete(run)})
    child = live(folder, series, "killed", NO_END)
    wait_for_a_step(run, child)
    os.kill(child, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    asked = {"code": code, "step": last_step(run), "left": complete(run)}
    end = last_step(run) + 2 * EVERY
    hashes = [finish(folder, series, name, end) for name in ("killed", "whole")]
    told = {
        "lives": lives,
        "read": _lines(folder / "killed.read"),
        "indexes": _lines(folder / "killed.indexes"),
        "asked": asked,
        "end": end,
        "hashes": hashes,
        "steps": trained_steps(run),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
