"""Several local processes do what one does: train, stop together, go on, index and evaluate."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from atlas_jax import ask, evaluate, from_gin
from atlas_jax.build_index import main as build_index_main
from atlas_jax.core.config import load_gin
from atlas_jax.core.devices import use_devices
from atlas_jax.core.preemption import PREEMPTED
from atlas_jax.models.assembly import assemble, export_model
from atlas_jax.training.metrics import read_metrics
from tests.index.index_files import index_bytes
from tests.training.runs import read_lines, write_lines, write_run

ROOT = Path(__file__).parents[2]
DEVICES, STEPS = 4, 10

# A machine that stops its jobs for minutes shall not look like a dead process. The first argument
# makes the steps so slow (seconds) that a signal comes before the last one.
CHILD = """
import functools, importlib, sys, time
import jax
patient = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=3600)
jax.distributed.initialize = patient
from atlas_jax.training.metrics import RunLog
advance = RunLog.advance
RunLog.advance = lambda log: (time.sleep(float(sys.argv[1])), advance(log))
sys.exit(importlib.import_module(f"atlas_jax.{sys.argv[2]}").main(sys.argv[3:]))
"""

# At its end it tells how many passages it has read and how many questions it has tokenised.
COUNTING = """
import atexit, collections
from atlas_jax.answering.batcher import Batcher
from atlas_jax.index.passages import PassageStore
counts = collections.Counter()
def counted(owner, name):
    plain = getattr(owner, name)
    def call(*given):
        counts[name] += 1
        return plain(*given)
    setattr(owner, name, call)
plain = PassageStore.passages
def passages(store, rows):
    counts["passage"] += len(rows)
    return plain(store, rows)
PassageStore.passages = passages
counted(Batcher, "_query")
atexit.register(lambda: print("counts", counts["passage"], counts["_query"]))
"""

Processes = list[subprocess.Popen[str]]


def start(
    gin_file: Path,
    model_dir: Path,
    count: int,
    *bindings: str,
    pause: float = 0,
    command: str = "train",
    child: str = CHILD,
) -> Processes:
    """Begin a run of `write_run` in so many processes, which share the four devices."""
    own = [
        f"TrainConfig.model_dir={model_dir}",
        f"TrainConfig.total_steps={STEPS}",
        "StepConfig.retriever_training='joint'",
        "CorpusConfig.embed_batch_size=4",
    ]
    return begin(command, str(gin_file), [*own, *bindings], count, pause, child)


def begin(
    command: str,
    gin_file: str,
    bindings: Sequence[str],
    count: int,
    pause: float = 0,
    child: str = CHILD,
) -> Processes:
    """Begin any command in so many processes, which share the four devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        *(sys.executable, "-c", child, str(pause), command, f"--gin_file={gin_file}"),
        *(f"--gin.{binding}" for binding in bindings),
    ]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES // count),
    }
    hosts = [f"--coordinator_address=127.0.0.1:{port}", f"--process_count={count}"]
    return [
        subprocess.Popen(
            [*arguments, *([*hosts, f"--process_index={index}"] if count > 1 else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for index in range(count)
    ]


def finish(processes: Processes, code: int = 0, timeout: float = 1200) -> list[str]:
    """What they print, once all have ended with this code; none outlives the timeout (seconds)."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [code] * len(processes), (codes, *(output[-3000:] for output in outputs))
    return outputs


def losses(model_dir: Path) -> list[dict[str, float]]:
    return [row for row in read_metrics(model_dir) if "train/skipped" in row]


@pytest.mark.slow
def test_two_and_four_processes_do_what_one_does(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    alone, together = tmp_path / "alone", tmp_path / "together"
    finish(start(gin_file, alone, 1, "MeshConfig.data=2", "MeshConfig.fsdp=2"))

    # Two begin. One of them is told to end, and both do, after the same step, which is saved.
    two = start(gin_file, together, 2, "MeshConfig.data=2", "MeshConfig.fsdp=2", pause=0.3)
    while not losses(together) and two[0].poll() is None:
        time.sleep(0.05)
    two[1].send_signal(signal.SIGTERM)
    outputs = finish(two, PREEMPTED)
    stopped = losses(together)[-1]["step"]
    assert 1 <= stopped < STEPS
    for output in outputs:
        assert f"stopped at step {stopped}, which is saved" in output
    assert [path.name for path in (together / "checkpoints").iterdir()] == [str(stopped)]

    # Four go on, on another mesh.
    outputs = finish(start(gin_file, together, 4, "MeshConfig.data=1", "MeshConfig.fsdp=4"))
    assert f"train {STEPS}/{STEPS}" in outputs[0]  # process 0 reports, the others are silent
    assert not any(f"train {STEPS}/{STEPS}" in output for output in outputs[1:])

    rows = [losses(run) for run in (alone, together)]
    assert [[row["step"] for row in run] for run in rows] == [list(range(1, STEPS + 1))] * 2
    for name in ("reader_loss", "retriever_loss", "reader_grad_norm", "retriever_grad_norm"):
        values = np.array([[row[f"train/{name}"] for row in run] for run in rows])
        np.testing.assert_allclose(values[0], values[1], rtol=1e-4, err_msg=name)
    file = Path("predictions") / f"step_{STEPS:07d}.jsonl"
    predictions = [read_lines(run / file) for run in (alone, together)]
    found = [[[p["id"] for p in row["passages"]] for row in rows] for rows in predictions]
    assert found[0] == found[1]
    answers = [[row["prediction"] for row in rows] for rows in predictions]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_two_and_four_processes_index_and_evaluate_as_one_does(
    tmp_path: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same bytes, of 13 questions in batches of 5, which do not divide over the devices."""
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    asked = (read_lines(tmp_path / "train.jsonl") * 3)[:13]
    write_lines(tmp_path / "many.jsonl", [{**row, "id": str(i)} for i, row in enumerate(asked)])
    load_gin([str(gin_file)])
    with use_devices(from_gin.devices()) as (mesh, rules):
        made = assemble(from_gin.models(), mesh, rules)
        parts = (made.models, made.params, made.tokenizers)
        export_model(tmp_path / "model", *parts, dtype="float32", about={})

    def bindings(folder: Path) -> list[str]:
        return [
            *(f"ModelConfig.{part}={tmp_path}/model" for part in ("reader", "retriever")),
            *(f"ModelConfig.{part}_tokenizer=''" for part in ("reader", "retriever")),
            f"CorpusConfig.index={folder}/index",
            "CorpusConfig.dtype=int8",
            f"EvalConfig.predictions={folder}/predictions.jsonl",
            f"EvalConfig.file={tmp_path}/many.jsonl",
            "EvalConfig.batch_size=5",
            "StepConfig.rerank=8",
            "RecallConfig.sample=0",  # it asks questions a second time
            f"MeshConfig.data={DEVICES}",
        ]

    four = jax.devices()[:DEVICES]
    monkeypatch.setattr(jax, "devices", lambda *_: four)
    alone, together, printed = tmp_path / "alone", tmp_path / "together", {}
    for main in (build_index_main, evaluate.main):
        assert main([f"--gin_file={gin_file}", *(f"--gin.{b}" for b in bindings(alone))]) == 0
        printed[main.__module__.rpartition(".")[2]] = capsys.readouterr().out
    for command in printed:
        own = bindings(together)
        run = start(gin_file, together, 2, *own, command=command, child=COUNTING + CHILD)
        first, second = finish(run)
        said = printed[command].replace(str(alone), str(together))
        assert said in first and said not in second  # one of them reports
    # Each passage of a batch is read by one of them, each question tokenised by one.
    found = read_lines(together / "predictions.jsonl")
    batches = [found[at : at + 5] for at in range(0, len(found), 5)]
    wanted = sum(len({p["id"] for row in batch for p in row["passages"]}) for batch in batches)
    counts = [re.findall(r"^counts (\d+) (\d+)$", out, re.MULTILINE)[-1] for out in (first, second)]
    passages, questions = (list(map(int, column)) for column in zip(*counts, strict=True))
    passages[0] -= len({name for row in asked for name in row["gold"]})  # it looks for them
    assert sum(passages) == wanted and max(passages) - min(passages) <= len(batches)
    assert sum(questions) <= 13 + len(batches) and max(questions) < 13  # and what fills a batch up
    assert index_bytes(alone / "index") == index_bytes(together / "index")
    four_of_them = [*bindings(together), f"EvalConfig.predictions={tmp_path}/four.jsonl"]
    finish(start(gin_file, together, 4, *four_of_them, command="evaluate"))
    made = [alone / "predictions.jsonl", together / "predictions.jsonl", tmp_path / "four.jsonl"]
    assert len({path.read_bytes() for path in made}) == 1


@pytest.mark.slow
def test_two_processes_search_their_shares_with_scann(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    """Both train on what one finds, and each saves what it has built of its own rows."""
    pytest.importorskip("scann", reason="needs ScaNN")
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    found = []
    for count in (1, 2):
        folder = tmp_path / f"run_{count}"
        finish(
            start(
                gin_file, folder, count, "MeshConfig.data=4", "CorpusConfig.searcher='scann'",
                "ScannConfig.hash_from=4", "ScannConfig.rescored=100",
            )
        )  # fmt: skip
        rows = losses(folder)
        found.append([[row[f"train/{name}"] for row in rows] for name in ("reader_loss",)])
        saved = sorted(path.suffix for path in folder.rglob("embeddings-*.scann*"))
        assert saved == ([".scann"] if count == 1 else [".scann-1-of-2", ".scann-2-of-2"])
    np.testing.assert_allclose(*found, rtol=1e-4)
    file = Path("predictions") / f"step_{STEPS:07d}.jsonl"
    predictions = [read_lines(tmp_path / f"run_{count}" / file) for count in (1, 2)]
    one, two = ([[p["id"] for p in row["passages"]] for row in rows] for rows in predictions)
    assert one == two


@pytest.mark.slow
def test_processes_embed_many_batches_together(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    # JAX lets a process be 32 programs ahead of the others, then waits for ever: 120 batches.
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    texts = [{"id": str(i), "title": "T", "text": "word " * (1 + i % 9)} for i in range(480)]
    write_lines(tmp_path / "many.jsonl", texts)
    bindings = [
        f"CorpusConfig.passages='{tmp_path}/many.jsonl'",
        f"CorpusConfig.store='{tmp_path}/many'",
    ]
    made = {}
    for count in (1, 2, 4):
        index = tmp_path / f"index_{count}"
        own = [*bindings, f"CorpusConfig.index='{index}'"]
        run = start(gin_file, tmp_path / "run", count, *own, command="build_index")
        assert f"{index}: 480 passages" in finish(run, timeout=900)[0]
        made[count] = index_bytes(index)
    assert made[1] == made[2] == made[4]
    assert len([name for name in made[1] if name.startswith("rows/c/")]) == 4  # one a device


@pytest.mark.slow
def test_all_processes_end_with_a_fault_in_a_batch_of_one(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    """In a record that is not among those that are checked before the first step."""
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    rows = [{**row, "id": str(i)} for i, row in enumerate(read_lines(tmp_path / "train.jsonl") * 9)]
    del rows[50]["passages"]
    write_lines(tmp_path / "train.jsonl", rows)
    fewer = "from atlas_jax.training import trainer\ntrainer._CHECKED = 1\n"
    own = ("TrainConfig.passages='file'", "MeshConfig.data=4")
    run = start(gin_file, tmp_path / "run", 2, *own, child=fewer + CHILD)
    outputs = finish(run, 2, timeout=300)
    fault = f"{tmp_path}/train.jsonl: record '50' has no field 'passages'"
    assert all(fault in output for output in outputs), outputs
    assert sum(f" of 2: {fault}" in output for output in outputs) == 1  # the other one's


@pytest.mark.parametrize("flag", ["--multihost=on", "--coordinator_address=host:1"])
def test_a_command_for_one_process_says_so(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask.main(["Why?", flag]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {flag.partition('=')[0]}: atlas-jax ask works in one process" in error
    assert "evaluate" in error
