"""Each few-shot method on one device and on eight, and in two processes: the same run."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.devices import Devices
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.training.classifier_config import ClassifierRun, ClassifierTrainConfig
from atlas_jax.training.classifier_trainer import train_classifier
from atlas_jax.training.config import OptimizerConfig
from atlas_jax.training.demonstrations import DemonstrationConfig
from atlas_jax.training.self_training import self_train
from atlas_jax.training.self_training_config import SelfTrainConfig, SelfTrainingRun
from tests.training import claims
from tests.training.classified import TASK, save_tiny, write_texts
from tests.training.runs import read_lines
from tests.training.test_encoder_processes import agree
from tests.training.test_processes import begin, finish

SOFT = dataclasses.replace(TASK, query_format="{soft} {text} {soft!2} {mask} .")
MESH = Devices(MeshConfig(data=4, fsdp=2))
RATE = OptimizerConfig(learning_rate=1e-2, total_steps=4, weight_decay=0.0)
Run = Callable[[Path, str, Devices], Any]


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    (folder / "claims").mkdir()
    claims.write_claims(folder / "claims")
    claims.save_pair(folder / "claims" / "pair", reader_tokenizer_file, retriever_tokenizer_file)
    save_tiny(folder / "encoder", retriever_tokenizer_file)
    write_texts(folder / "train.jsonl", 16)
    write_texts(folder / "dev.jsonl", 10, seed=5)
    write_texts(folder / "many.jsonl", 40, seed=7)
    return folder


def files(work: Path, name: str) -> dict[str, Any]:
    return {
        "model_dir": str(work / name), "encoder": str(work / "encoder"), "length": 16,
        "file": str(work / "train.jsonl"), "eval_file": str(work / "dev.jsonl"),
        "eval_batch_size": 8, "batch_size": 8, "log_every": 1,
    }  # fmt: skip


def classifying(**fields: Any) -> Run:
    train = fields.pop("train", ())

    def run(work: Path, name: str, devices: Devices) -> Any:
        config = ClassifierTrainConfig(**files(work, name), total_steps=4, train=train)
        told = {"task": TASK, "optimizer": RATE, **fields}
        return train_classifier(ClassifierRun(train=config, devices=devices, **told))

    return run


def self_training(work: Path, name: str, devices: Devices) -> Any:
    config = SelfTrainConfig(
        **files(work, name), unlabelled_file=str(work / "many.jsonl"), unlabelled_batch_size=8,
        meta_batch_size=8, teacher_steps=2, rounds=1, kd_steps=2, meta_steps=1, tune_steps=1,
        teacher_learning_rate=1e-2, student_learning_rate=1e-2,
    )  # fmt: skip
    delta = DeltaConfig(kind="adapter", rank=2)
    return self_train(SelfTrainingRun(task=TASK, train=config, delta=delta, devices=devices))


RUNS: dict[str, Run] = {
    "LoRA": classifying(delta=DeltaConfig("lora", rank=2)),
    "demonstrations": classifying(demonstrations=DemonstrationConfig("random", draws=2)),
    "P-tuning of all": classifying(
        task=SOFT, delta=DeltaConfig("prompt", length=3, network="fewshot"), train=("*",),
        optimizer=dataclasses.replace(RATE, learning_rate=1e-3, delta_rate=10.0),
    ),
    "prefix": classifying(delta=DeltaConfig("prefix", length=3, network="mlp", width=8)),
    "self-training": self_training,
    "self-training of the reader": lambda work, name, devices: self_train(
        claims.told(work / "claims", f"../{name}", devices=devices, pseudo_labels="hard")
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", list(RUNS))
def test_one_device_computes_what_eight_do(
    work: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    eight, runs = jax.devices(), []
    for devices, told in ((eight, MESH), (eight[:1], Devices())):
        monkeypatch.setattr(jax, "devices", lambda *_, chosen=devices: chosen)
        runs.append(work / f"{method} on {len(devices)}")
        RUNS[method](work, runs[-1].name, told)
    agree(*runs, ("train/loss", "eval/accuracy"))


def _bindings(work: Path, lengths: Sequence[str]) -> list[str]:
    return [
        f"ENCODER='{work}/encoder'", f"TRAIN_FILE='{work}/train.jsonl'",
        f"EVAL_FILE='{work}/dev.jsonl'", f"UNLABELLED_FILE='{work}/many.jsonl'", "BATCH_SIZE=8",
        "TEXT_LENGTH=16", "MeshConfig.data=4", "SST2Task.query_format='{text} {mask}'",
        "SST2Task.label_words={'negative': 'small', 'positive': 'large'}", *lengths,
    ]  # fmt: skip


COMMANDS = {
    "self_train": ("runs/list_30shot.gin", [
        "UNLABELLED_BATCH_SIZE=8", "TEACHER_STEPS=2", "ROUNDS=1", "KD_STEPS=2", "META_STEPS=1",
        "TUNE_STEPS=1", "STUDENT_LEARNING_RATE=1e-2", "SelfTrainConfig.eval_batch_size=8",
        "SelfTrainConfig.log_every=1", "encoder/DeltaConfig.rank=2", "CHECKPOINT_EVERY=2",
    ]),
    "pet": ("runs/pet.gin", [
        "SEEDS=1", "STEPS=2", "DISTIL_STEPS=2", "DISTIL_BATCH_SIZE=8", "LEARNING_RATE=1e-2",
        "PetConfig.eval_batch_size=8", "PetConfig.log_every=1",
    ]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", list(COMMANDS))
def test_two_processes_teach_as_one_does(work: Path, command: str) -> None:
    gin_file, lengths = COMMANDS[command]
    runs = []
    for count, name in ((1, "alone"), (2, "together")):
        runs.append(work / command / name)
        own = [*_bindings(work, lengths), f"MODEL_DIR='{runs[-1]}'"]
        finish(begin(command, gin_file, own, count))
    agree(*runs, ("train/loss", "eval/accuracy"))
    if command == "pet":
        one, other = (read_lines(run / "members.jsonl") for run in runs)
        for mine, theirs in zip(one, other, strict=True):
            assert np.isclose(mine["weight"], theirs["weight"])
