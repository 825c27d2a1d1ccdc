"""`self_train` from files to a folder: resume inside a round, what is left out, what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

from atlas_jax import from_gin
from atlas_jax import self_train as entry
from atlas_jax.core.config import load_gin, write_config
from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.devices import Devices, use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.models.encoder_folder import load_encoder
from atlas_jax.models.folder import read_about
from atlas_jax.training import self_training
from atlas_jax.training.config import CheckpointConfig, OptimizerConfig
from atlas_jax.training.metrics import read_metrics
from atlas_jax.training.self_training import self_train
from atlas_jax.training.self_training_config import SelfTrainConfig, SelfTrainingRun
from tests.device_bytes import device_bytes, most_bytes
from tests.training.classified import TASK, save_tiny, write_texts
from tests.training.runs import read_lines

SPREAD = Devices(MeshConfig(data=1, fsdp=4, model=2))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, retriever_tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("self_training")
    save_tiny(folder / "encoder", retriever_tokenizer_file)
    write_texts(folder / "train.jsonl", 8)
    write_texts(folder / "dev.jsonl", 16, seed=5)
    few, dev = read_lines(folder / "train.jsonl"), read_lines(folder / "dev.jsonl")
    write_texts(folder / "many.jsonl", 40, seed=7)
    known = [{"text": row["text"].upper()} for row in (*few[:3], *dev[:2])]
    write_jsonl(folder / "many.jsonl", [*read_lines(folder / "many.jsonl"), *known])
    return folder


def told(work: Path, name: str, every: int = 0, **fields: Any) -> SelfTrainingRun:
    config = SelfTrainConfig(
        **{
            "model_dir": str(work / name), "encoder": str(work / "encoder"),
            "file": str(work / "train.jsonl"), "unlabelled_file": str(work / "many.jsonl"),
            "eval_file": str(work / "dev.jsonl"), "teacher_steps": 3, "rounds": 2, "kd_steps": 2,
            "meta_steps": 2, "tune_steps": 1, "length": 12, "eval_batch_size": 16,
            "batch_size": 8, "meta_batch_size": 8,
            "teacher_learning_rate": 1e-2, "student_learning_rate": 1e-2, "log_every": 1, **fields,
        }
    )  # fmt: skip
    delta = DeltaConfig(kind="adapter", rank=2)
    saved = CheckpointConfig(every=every, keep=20)
    return SelfTrainingRun(task=TASK, train=config, delta=delta, checkpoints=saved)


class _Killed(Exception):
    pass


@pytest.mark.slow
def test_a_run_killed_inside_a_round_repeats_itself_bit_for_bit(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = self_train(told(work, "whole", every=1))
    assert "many.jsonl: 5 known lines are left out" in capsys.readouterr().err
    rows = [row for row in read_metrics(work / "whole") if "train/phase" in row]
    assert [row["train/phase"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 3, 1, 1, 1, 2, 3]
    assert rows[-1]["train/round"] == 1
    assert read_metrics(work / "whole")[-1]["eval/accuracy"] == scores["accuracy"]
    about = read_about(work / "whole" / "final")
    assert (about["steps"], about["method"]) == (13, "prompt")

    place, seen = self_training._placed, []

    def killing(run: Any, rows: Any) -> Any:
        seen.append(rows)
        if len(seen) == 10:  # in the second round
            raise _Killed
        return place(run, rows)

    monkeypatch.setattr(self_training, "_placed", killing)
    with pytest.raises(_Killed):
        self_train(told(work, "killed", every=2))
    monkeypatch.setattr(self_training, "_placed", place)
    assert self_train(told(work, "killed", every=2)) == scores
    one, other, base = (
        load_encoder(work / name) for name in ("whole/final", "killed/final", "encoder")
    )
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    flat = traverse_util.flatten_dict(one.params["encoder"], sep="/")
    for path, leaf in traverse_util.flatten_dict(base.params["encoder"], sep="/").items():
        np.testing.assert_array_equal(flat[path], leaf)  # the backbone is frozen


def test_a_run_begins_in_its_shards(work: Path) -> None:
    check_start(dataclasses.replace(told(work, "unused"), devices=SPREAD), work / "unused")


def check_start(run: Any, directory: Path) -> None:
    """The state is made where it belongs, and nothing more is on a device meanwhile."""
    with use_devices(run.devices) as (mesh, rules):
        taught = self_training._taught(run, directory, mesh, rules)
        loop = self_training._loop(
            self_training._Run(run, directory, taught, mesh, rules, ()), None
        )
        state, most = most_bytes(loop.begin)
    held, whole = device_bytes(state), sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert len(held) == 8 and max(held.values()) < whole / 3  # some norms lie everywhere
    assert most <= max((held + device_bytes(state.params)).values()) + 64  # and keys
    for own, place in zip(jax.tree.leaves(state), jax.tree.leaves(loop.shapes), strict=True):
        assert own.sharding.is_equivalent_to(place.sharding, own.ndim)


def test_bad_input_is_named(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = read_lines(work / "train.jsonl")
    write_jsonl(work / "none.jsonl", [{"text": f" {row['text']} "} for row in every])
    with pytest.raises(UserError, match=r"none.jsonl: every line is one of .*train.jsonl or"):
        self_train(told(work, "bad", unlabelled_file=str(work / "none.jsonl")))
    with pytest.raises(UserError, match=r"SelfTrainConfig.unlabelled_file = ''"):
        told(work, "bad", unlabelled_file="")
    with pytest.raises(UserError, match="SelfTrainConfig.kd_steps = 0: expected a round"):
        told(work, "bad", kd_steps=0, meta_steps=0, tune_steps=0)
    flags = [f"--gin.{name}={work / 'x'}" for name in ("MODEL_DIR", "ENCODER", "TRAIN_FILE",
                                                       "UNLABELLED_FILE")]  # fmt: skip
    rate = "--gin.encoder/OptimizerConfig.learning_rate=1e-3"
    assert entry.main(["--gin_file=runs/list_30shot.gin", *flags, rate]) == 2
    assert "bind SelfTrainConfig.student_learning_rate" in capsys.readouterr().err


def test_a_python_run_is_written_as_a_gin_file_that_repeats_it(work: Path) -> None:
    run = told(work, "x", encoder_base="base")
    run = dataclasses.replace(run, optimizer=OptimizerConfig(b2=0.98, learning_rate=0.5))
    text = self_training.as_gin(run)
    assert "OptimizerConfig.learning_rate" not in text  # the command refuses it
    write_config(work / "python.gin", text)
    load_gin([str(work / "python.gin")])
    again = from_gin.self_training_run()
    assert (again.train, again.task, again.delta) == (run.train, run.task, run.delta)
    assert again.checkpoints == run.checkpoints
    own = {name: getattr(SelfTrainingRun.optimizer, name) for name in SelfTrainingRun.DECIDED}
    assert again.optimizer == dataclasses.replace(run.optimizer, **own)
