"""Where a run's numbers go: one line in the terminal, a jsonl file, and TensorBoard."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from atlas_jax.core.jsonl import atomic_text
from atlas_jax.core.paths import is_remote

METRICS_FILE = "metrics.jsonl"

# Wherever PyTorch is installed, tensorboardX imports it: for its tensors alone, and for 1.5 s.
_HIDDEN = {"torch"} - set(sys.modules)
sys.modules.update(dict.fromkeys(_HIDDEN))  # type: ignore[arg-type]  # None: it is not found
try:
    from tensorboardX import SummaryWriter
finally:
    for _name in _HIDDEN:
        del sys.modules[_name]


class RunLog:
    """Progress bar and metrics of one run; use as a context manager.

    In a bucket no TensorBoard files are written.

    A resumed run continues the same files. Rows after the step that it resumes from are removed
    first, since these steps are repeated. So every step appears once.
    """

    def __init__(
        self, directory: Path, first_step: int, total_steps: int, writes: bool = True
    ) -> None:
        """Open the files of `directory` at `first_step` finished steps.

        Args:
          writes: True for one of several processes; the others write nothing.
        """
        self._rows: _Rows | None = None
        self._board: SummaryWriter | None = None
        if writes:
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / METRICS_FILE
            _drop_rows_after(path, first_step)
            self._rows = _Rows(path)
        if writes and not is_remote(directory):
            self._board = SummaryWriter(
                str(directory / "tensorboard"),
                purge_step=first_step + 1,
                # Otherwise two runs that begin in the same second would write the same file.
                filename_suffix=f".{first_step:09d}",
            )
        self._start = time.monotonic()
        self._total = total_steps
        # disable=None: no bar if the output is not a terminal (lines are still printed).
        self._bar = tqdm(
            initial=first_step,
            total=total_steps,
            desc="train",
            unit="step",
            disable=None if writes else True,
        )

    def advance(self) -> None:
        """Move the progress bar by one step."""
        self._bar.update()

    def write(self, step: int, group: str, values: Mapping[str, float]) -> None:
        """Record numbers of one step under `group/name` in all three places.

        In jsonl a number that is not finite is null: JSON has no such number.
        """
        if self._rows is None:
            return
        row: dict[str, float | int | None] = {
            "step": step,
            "seconds": round(time.monotonic() - self._start, 3),
        }
        for name, value in values.items():
            row[f"{group}/{name}"] = float(value) if math.isfinite(value) else None
            if self._board is not None:
                self._board.add_scalar(f"{group}/{name}", float(value), step)
        self._rows.add(json.dumps(row) + "\n")
        tqdm.write(f"{group} {step}/{self._total}  {format_values(values)}")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self._rows is not None:
            self._rows.close()
        if self._board is not None:
            self._board.close()


class _Rows:
    """The metrics file. Lines are added; in a bucket the whole file is written again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = None if is_remote(path) else path.open("a", encoding="utf-8")
        self._text = path.read_text(encoding="utf-8") if not self._file and path.exists() else ""

    def add(self, line: str) -> None:
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._text += line
        self._path.write_text(self._text, encoding="utf-8")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def format_values(values: Mapping[str, float]) -> str:
    """Numbers for people: `reader_loss 1.234  skipped 0`."""
    return "  ".join(f"{name} {_short(value)}" for name, value in values.items())


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics file, oldest first, without a row that a kill cut off."""
    rows = []
    path = directory / METRICS_FILE
    if not path.exists():
        return []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _drop_rows_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_metrics(path.parent) if row["step"] <= step]
    with atomic_text(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)


def _short(value: float) -> str:
    if float(value).is_integer() and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.4g}"
