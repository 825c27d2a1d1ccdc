"""Runs that are killed again and again, at random moments, and what they lose.

`ATLAS_KILLS=50 python -m pytest -s tests/training/test_kill_often.py` prints the figures of
docs/tpu.md.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from atlas_jax.core.preemption import PREEMPTED
from atlas_jax.planning.report import versions
from tests.training.kill_often import EVERY, KEEP
from tests.training.runs import write_run
from tests.training.test_resume import timeless

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("ATLAS_KILLS", "20"))
DEVICES = {"closed_book": 1, "rolling": 2}


@pytest.mark.slow
@pytest.mark.parametrize(("series", "kills"), [("closed_book", KILLS), ("rolling", 10)])
def test_no_kill_loses_a_checkpoint_or_more_than_the_steps_since(
    tmp_path: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
    series: str,
    kills: int,
) -> None:
    begun = time.monotonic()
    write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.kill_often", str(tmp_path), str(kills), "0", series],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=3600,
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": str(DEVICES[series]),
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({**figures(told), "seconds": round(time.monotonic() - begun)}, indent=1))
    assert len(told["lives"]) == kills
    # A life that could not read one of its checkpoints would have ended by itself; one of five
    # may be killed before it has read any.
    assert sum(len(steps) >= KEEP for steps in told["read"]) >= kills * 3 // 4
    for life in told["lives"]:
        newest = max(life["left"], default=0)
        assert newest >= max(life["complete"], default=0), life
        # One checkpoint may be in the making while the steps to the next are taken.
        assert life["step"] - newest <= 2 * EVERY, life
    assert told["lives"][-1]["step"] >= EVERY * (2 * kills // 5)  # they did take steps
    # Asked to end, it saves the step that it has just taken.
    assert told["asked"]["code"] == PREEMPTED
    assert told["asked"]["left"][-1] == told["asked"]["step"]
    assert told["steps"] == list(range(1, told["end"] + 1))
    assert told["hashes"][0] == told["hashes"][1]
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    if series == "rolling":  # indexes of both kinds were read after kills, of several versions
        indexes = [tuple(one) for life in told["indexes"] for one in life]
        assert {held for _, held in indexes} == {True, False}
        assert len({version for version, _ in indexes}) > 2
    else:
        assert not told["indexes"]


def figures(told: dict[str, Any]) -> dict[str, Any]:
    """What the kills cost, in short."""
    lost = [life["step"] - max(life["left"], default=0) for life in told["lives"]]
    return {
        "kills": len(lost),
        "steps between checkpoints": EVERY,
        "steps lost, mean": round(sum(lost) / len(lost), 2),
        "steps lost, max": max(lost),
        "checkpoints read after a kill": sum(map(len, told["read"])),
        "of them with an index": sum(map(len, told["indexes"])),
        "final states, SHA-256": [one[:16] for one in told["hashes"]],
        "versions": {name: version for name, version in versions().items() if name != "libtpu"},
    }
