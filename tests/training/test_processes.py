"""Several local processes train as one does, and go on from each other's checkpoints."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.training.metrics import read_metrics
from tests.training.runs import read_lines, write_run

ROOT = Path(__file__).parents[2]
DEVICES = 4

# A machine that stops its jobs for minutes shall not look like a dead process.
CHILD = """
import functools, sys
import jax
patient = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=3600)
jax.distributed.initialize = patient
from atlas_jax.train import main
sys.exit(main(sys.argv[1:]))
"""


def train(
    gin_file: Path, model_dir: Path, processes: int, steps: int, *bindings: str
) -> list[subprocess.CompletedProcess[str]]:
    """Run `train` to its end in so many processes, which share the four devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-c", CHILD, f"--gin_file={gin_file}"),
        f"--gin.TrainConfig.model_dir={model_dir}",
        f"--gin.TrainConfig.total_steps={steps}",
        *(f"--gin.{binding}" for binding in bindings),
    ]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES // processes),
    }
    running = []
    for index in range(processes):
        hosts = (
            f"--coordinator_address=127.0.0.1:{port}",
            f"--process_count={processes}",
            f"--process_index={index}",
        )
        running.append(
            subprocess.Popen(
                [*command, *(hosts if processes > 1 else ())],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
                env=environment,
            )
        )
    ended = []
    for process in running:
        output = process.communicate(timeout=900)[0]
        ended.append(subprocess.CompletedProcess(command, process.returncode, output))
    assert [one.returncode for one in ended] == [0] * processes, ended[0].stdout + ended[-1].stdout
    return ended


@pytest.mark.slow
def test_two_and_four_processes_do_what_one_does(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    shared = ("StepConfig.retriever_training='joint'", "CorpusConfig.embed_batch_size=4")
    alone, together = tmp_path / "alone", tmp_path / "together"
    train(gin_file, alone, 1, 4, *shared, "MeshConfig.data=2", "MeshConfig.fsdp=2")
    # Two processes begin, four go on, on another mesh.
    train(gin_file, together, 2, 2, *shared, "MeshConfig.data=2", "MeshConfig.fsdp=2")
    ended = train(gin_file, together, 4, 4, *shared, "MeshConfig.data=1", "MeshConfig.fsdp=4")

    assert "train 3/4" in ended[0].stdout  # process 0 reports, the others are silent
    assert not any("train 3/4" in one.stdout for one in ended[1:])
    rows = [[r for r in read_metrics(run) if "train/skipped" in r] for run in (alone, together)]
    assert [[row["step"] for row in run] for run in rows] == [[1, 2, 3, 4]] * 2
    for name in ("reader_loss", "retriever_loss", "reader_grad_norm", "retriever_grad_norm"):
        values = np.array([[row[f"train/{name}"] for row in run] for run in rows])
        np.testing.assert_allclose(values[0], values[1], rtol=2e-5, err_msg=name)
    predictions = [
        read_lines(run / "predictions" / "step_0000004.jsonl") for run in (alone, together)
    ]
    found = [[[p["id"] for p in row["passages"]] for row in rows] for rows in predictions]
    assert found[0] == found[1]
    answers = [[row["prediction"] for row in rows] for rows in predictions]
    assert answers[0] == answers[1]
