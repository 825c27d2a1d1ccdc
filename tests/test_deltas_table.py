"""The table of what part of a reader trains."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import deltas


def figures(row: str, seed: int, score: float, seconds: float) -> dict[str, Any]:
    return {"row": row, "seed": seed, "EM": score, "F1": score + 5, "trained": 1234,
            "bytes": 2_500_000, "seconds": seconds}  # fmt: skip


def test_a_row_is_the_mean_of_its_seeds_beside_training_all() -> None:
    found = [figures("all", 0, 20, 2.0), figures("LoRA", 0, 10, 1.0), figures("LoRA", 1, 13, 1.5)]
    drawn = io.StringIO()
    Console(file=drawn, width=100).print(deltas.table(found))
    line = next(line for line in drawn.getvalue().splitlines() if "LoRA" in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == ["LoRA", "0.01", "11.5", "16.5", "1,234", "2.50 MB", "0.62"]


def test_an_unknown_row_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        deltas.main(["--rows=all,lora"])
    assert "--rows: no row 'lora'; there are all, adapters (LiST)" in capsys.readouterr().err


def test_every_row_has_its_file() -> None:
    gin = Path(deltas.__file__).parents[1] / "gin" / "deltas"
    assert all((gin / f"{file}.gin").is_file() for file, _ in deltas.ROWS.values() if file)
