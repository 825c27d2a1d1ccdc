"""A store and its index whose processes are killed at random moments are whole in the end."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.index.index_files import index_bytes
from tests.index.test_shards import content, write

ROOT = Path(__file__).parents[2]
COUNT = 240
ROWS = [{"id": f"p{i:03}", "title": f"Title {i:03}", "text": "word é " * 6} for i in range(COUNT)]


def shares(attempt: dict[str, Any]) -> list[list[int]]:
    """Rows that each process has tokenised and embedded."""
    lines = (line.split() for line in attempt["made"])
    return [[int(number) for number in rest] for first, *rest in lines if first == "rows"]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "kills"), [(2, 6), (4, 4)])
def test_what_is_missing_is_made_and_nothing_else(
    tmp_path: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
    count: int,
    kills: int,
) -> None:
    """``ATLAS_KILLS`` sets the number of kills, and with it their moments."""
    source = write(tmp_path / "p.jsonl", ROWS)
    kills = int(os.environ.get("ATLAS_KILLS", kills))
    told = (source, tmp_path, reader_tokenizer_file, retriever_tokenizer_file, count, kills, kills)
    ended = subprocess.run(
        [sys.executable, "-m", "tests.index.killed", *map(str, told)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    whole, *attempts = map(json.loads, ended.stdout.splitlines())
    assert set(whole["codes"]) == {0}, ended.stderr[-3000:]
    assert sum(any(one["codes"]) for one in attempts) == kills
    # Each has done its share of the work, counted in rows: all of it once, and alike.
    for share in zip(*shares(whole), strict=True):
        assert sum(share) == COUNT and max(share) <= 1.2 * min(share), share
    for one in attempts:
        made = [name for name in one["made"] if not name.startswith("ro")]
        assert len(made) == len(set(made))  # by one process
        assert not set(made) & set(one["before"]["shards"])
        assert not made or not one["before"]["whole"][0]
        rounds = {int(name.split()[1]) for name in one["made"] if name.startswith("round")}
        for first in rounds:  # of four chunks, which the four devices embed side by side
            assert not set(range(first, first + 4)) <= set(one["before"]["chunks"])
    assert any(one["before"]["chunks"] for one in attempts), "no kill came while it embedded"
    # A build ends with what an undisturbed one has; the last attempt of each was left alone.
    builds = {one["folder"] for one in attempts if not any(one["codes"])}
    assert builds and builds == {one["folder"] for one in attempts}
    for name in builds:
        assert content(tmp_path / name / "store") == content(tmp_path / "whole" / "store")
        assert index_bytes(tmp_path / name / "index") == index_bytes(tmp_path / "whole" / "index")
