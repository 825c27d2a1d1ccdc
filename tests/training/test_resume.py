"""A run killed in the middle repeats, when started again, the uninterrupted one bit for bit."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from atlas_jax.training.metrics import read_metrics
from tests.index.index_files import index_bytes
from tests.training.runs import read_lines, write_run

ROOT = Path(__file__).parents[2]

# Trains, then tells the hash of every array of the state.
CHILD = """
import hashlib, sys
import jax, numpy as np
from atlas_jax.core.config import load_gin
from atlas_jax import from_gin
from atlas_jax.training.trainer import train

load_gin([sys.argv[1]], sys.argv[2:])
state = train(from_gin.train_run())
for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    digest = hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
    print("STATE", jax.tree_util.keystr(path), digest)
"""


# How the index is kept fresh.
FULL = {"RefreshPolicy.schedule": "'4'"}
ROLLING = {
    "CorpusConfig.dtype": "'int8'",  # FULL has float32
    "StepConfig.rerank": 4,
    "RefreshPolicy.rolling_rows": 3,
    "RefreshPolicy.rolling_every": 1,
    "StalenessConfig.every": 3,
    "StalenessConfig.passages": 8,
    "StalenessConfig.k": 2,
}


# The mesh's sizes.
ALONE = {"data": 1, "fsdp": 1, "model": 1}
EIGHT = {"data": 2, "fsdp": 2, "model": 2}


def start(
    gin_file: Path, model_dir: Path, fresh: dict[str, Any], mesh: dict[str, int]
) -> subprocess.Popen[str]:
    bindings = {
        "TrainConfig.model_dir": f"'{model_dir}'",
        "TrainConfig.total_steps": 24,
        "TrainConfig.eval_every": 10,
        "CheckpointConfig.every": 5,
        "StepConfig.retriever_training": "'joint'",
        "DataConfig.batch_size": 4,
        "StepConfig.k": 2,
        **{f"MeshConfig.{axis}": size for axis, size in mesh.items()},
        **fresh,
    }
    devices = str(math.prod(mesh.values()))
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(gin_file), *(f"{k}={v}" for k, v in bindings.items())],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices},
    )


def finish(process: subprocess.Popen[str]) -> list[str]:
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    return [line for line in output.splitlines() if line.startswith("STATE")]


def wait_for_step(process: subprocess.Popen[str], model_dir: Path, step: int) -> None:
    for _ in range(60_000):
        if process.poll() is not None:
            break
        rows = read_metrics(model_dir)
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.01)
    pytest.fail(f"the run ended, or hung, before step {step}: {process.communicate()[0]}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fresh", "mesh"),
    [(FULL, ALONE), (ROLLING, ALONE), (ROLLING, EIGHT)],
    ids=["full", "rolling", "rolling on a mesh"],
)
def test_a_killed_run_repeats_the_uninterrupted_one(
    tmp_path: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
    fresh: dict[str, Any],
    mesh: dict[str, int],
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = finish(start(gin_file, whole, fresh, mesh))
    assert any("opt_state" in line and "retriever" in line for line in expected)

    with start(gin_file, killed, fresh, mesh) as process:
        wait_for_step(process, killed, 12)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "final").exists()
    assert finish(start(gin_file, killed, fresh, mesh)) == expected

    for name in ("final/reader.safetensors", "final/retriever.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    for folder in ("index/000005", "final_index") if fresh is FULL else ("final_index",):
        arrays = [index_bytes(run / folder) for run in (whole, killed)]
        assert arrays[0] == arrays[1]
        names = {name.partition("/")[0] for name in arrays[0]}
        assert names == ({"rows"} if fresh is FULL else {"rows", "scales"})
    for step in (10, 20, 24):
        name = f"predictions/step_{step:07d}.jsonl"
        assert read_lines(whole / name) == read_lines(killed / name)
    assert timeless(whole) == timeless(killed)
    assert [row["step"] for row in timeless(whole) if "train/skipped" in row] == list(range(1, 25))
    last = timeless(whole)[-2]
    if fresh is FULL:
        assert last["train/index_version"] == 5
        return
    assert last["train/index_version"] == 23 * 3 // 16
    measured = [row for row in timeless(whole) if "index/drift" in row]
    assert [row["step"] for row in measured] == [4, 7, 10, 13, 16, 19, 22]
    # 6 slices go round 16 passages, after which no row is older than 5 steps.
    assert [row["index/oldest_row"] for row in measured] == [3, 5, 5, 5, 5, 5, 5]
    assert all(0 < row["index/drift"] < 1 for row in measured)


def timeless(model_dir: Path) -> list[dict[str, float]]:
    """The metrics without what a clock decides."""
    return [
        {name: value for name, value in row.items() if "second" not in name}
        for row in read_metrics(model_dir)
    ]
