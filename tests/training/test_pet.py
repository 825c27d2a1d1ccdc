"""PET from files to a folder: members, what they say together, and the classifier of it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import from_gin
from atlas_jax import pet as entry
from atlas_jax.core.config import load_gin, write_config
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.models.folder import read_about
from atlas_jax.training import classifier_trainer
from atlas_jax.training.as_gin import as_gin
from atlas_jax.training.classifier_config import ClassifierRun, ClassifierTrainConfig
from atlas_jax.training.classifier_trainer import train_classifier
from atlas_jax.training.config import OptimizerConfig
from atlas_jax.training.ipet import new_lines, weighted_mean
from atlas_jax.training.metrics import read_metrics
from atlas_jax.training.pet import members_of, pet
from atlas_jax.training.pet_config import PetConfig, PetRun
from atlas_jax.training.prompted import SoftTexts, Texts, distil_loss
from tests.training.classified import TASK, save_tiny, write_texts
from tests.training.runs import read_lines

PATTERNS = ("{text} is {mask} .", "{mask} {text}")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, retriever_tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("pet")
    save_tiny(folder / "encoder", retriever_tokenizer_file)
    write_texts(folder / "train.jsonl", 64)
    write_texts(folder / "dev.jsonl", 24, seed=5)
    write_texts(folder / "many.jsonl", 96, seed=7)
    return folder


def told(work: Path, name: str, **fields: Any) -> PetRun:
    config = PetConfig(
        **{
            "model_dir": str(work / name), "encoder": str(work / "encoder"),
            "file": str(work / "train.jsonl"), "unlabelled_file": str(work / "many.jsonl"),
            "eval_file": str(work / "dev.jsonl"), "patterns": PATTERNS, "seeds": 1, "steps": 60,
            "distil_steps": 60, "length": 12, "eval_batch_size": 16, "learning_rate": 1e-2,
            **fields,
        }
    )  # fmt: skip
    return PetRun(task=TASK, train=config)


def test_members_label_texts_and_a_classifier_learns_what_they_say(work: Path) -> None:
    scores = pet(told(work, "whole"))
    assert scores["accuracy"] >= 0.8
    members = read_lines(work / "whole" / "members.jsonl")
    assert [one["pattern"] for one in members] == list(PATTERNS)
    assert all(one["weight"] == one["accuracy_before"] < one["accuracy"] for one in members)
    labelled = read_lines(work / "whole" / "unlabelled_predictions.jsonl")
    known = {row["text"] for name in ("train", "dev") for row in read_lines(work / f"{name}.jsonl")}
    assert labelled and not known & {row["text"] for row in labelled}
    right = [row["predicted_label"] == row["label"] for row in labelled]
    assert np.mean(right) >= 0.8
    assert "train/agreement" in read_metrics(work / "whole")[-2]
    about = read_about(work / "whole" / "final")
    assert (about["method"], about["steps"]) == ("head", 60)
    again = ClassifierTrainConfig(
        model_dir=str(work / "again"), encoder=str(work / "whole" / "final"), method="head",
        file=str(work / "train.jsonl"), eval_file=str(work / "dev.jsonl"), total_steps=0,
        length=12, eval_batch_size=16,
    )  # fmt: skip
    assert train_classifier(ClassifierRun(task=TASK, train=again)) == scores


@pytest.mark.slow
def test_a_run_that_was_killed_reads_its_members_again(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = told(work, "killed", patterns=PATTERNS[:1], steps=3, distil_steps=2)
    steps: list[str] = []
    place = classifier_trainer._placed

    def counting(texts: Any, *rest: Any) -> Any:
        steps.append(type(texts).__name__)
        if len(steps) == 4:  # the classifier's first step
            raise KeyboardInterrupt
        return place(texts, *rest)

    monkeypatch.setattr(classifier_trainer, "_placed", counting)
    with pytest.raises(KeyboardInterrupt):
        pet(run)
    assert steps == ["Texts"] * 3 + ["SoftTexts"]
    pet(run)
    assert steps[4:] == ["SoftTexts"] * 2


def test_the_loss_is_the_divergence_at_a_temperature() -> None:
    own, others = np.array([[0.3, -1.0], [2.0, 0.5]]), np.array([[1.0, 2.0], [3.0, -1.0]])
    zeros = np.zeros((2, 1), np.int32)
    soft = SoftTexts(Texts(zeros, zeros, zeros[:, 0], zeros[:, 0]), jnp.asarray(others))
    found, metrics = distil_loss(lambda *_: jnp.asarray(own), 2.0)({}, None, soft)

    def shares(x: np.ndarray) -> np.ndarray:
        return np.exp(x / 2) / np.exp(x / 2).sum(axis=1, keepdims=True)

    p, q = shares(others), shares(own)
    np.testing.assert_allclose(found, 4 * (p * np.log(p / q)).sum(axis=1).mean(), rtol=1e-5)
    assert metrics["agreement"] == 0.5


def test_members_count_by_their_accuracy() -> None:
    one, other = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    np.testing.assert_allclose(weighted_mean([one, other], [0.75, 0.25]), [[0.75, 0.25]])
    np.testing.assert_allclose(weighted_mean([one, other], [0.0, 0.0]), [[0.5, 0.5]])


def test_a_member_for_each_pattern_and_seed(work: Path) -> None:
    found = list(members_of(told(work, "x", seeds=2, seed=5)))
    assert [one.name for one in found] == [
        "pattern0_seed0", "pattern0_seed1", "pattern1_seed0", "pattern1_seed1",
    ]  # fmt: skip
    assert [one.seed for one in found] == [5, 6, 5, 6]
    (only,) = members_of(told(work, "x", patterns=()))
    assert only.task == TASK


def test_a_python_run_is_written_as_a_gin_file_that_repeats_it(work: Path) -> None:
    run = told(work, "x")
    run = dataclasses.replace(run, optimizer=OptimizerConfig(b2=0.98))
    write_config(work / "python.gin", as_gin(run))
    load_gin([str(work / "python.gin")])
    again = from_gin.pet_run()
    assert (again.train, again.task, again.delta) == (run.train, run.task, run.delta)
    own = {name: getattr(PetRun.optimizer, name) for name in PetRun.DECIDED}
    assert again.optimizer == dataclasses.replace(run.optimizer, **own)


def test_new_lines_keep_the_balance_and_come_from_the_others(work: Path) -> None:
    config = told(work, "x", seeds=2, generations=2, generation_factor=2.0).train
    labelled = TASK.load(work / "train.jsonl")[:12]
    labelled = [one for one in labelled if one.fields["label"] == "positive"] + labelled[1:7:2]
    unlabelled = TASK.load(work / "many.jsonl")
    # Members 0 to 2 say what is right, member 3 the opposite; of three others one is asked.
    right = np.array([[0.0, 4.0] if r.fields["label"] == "positive" else [4.0, 0.0]
                      for r in unlabelled])  # fmt: skip
    sets = new_lines(config, TASK, (labelled, unlabelled), [right] * 3 + [-right], [1.0] * 4, 1)
    counts = [[r.fields["label"] for r in new].count("positive") for new in sets]
    assert [len(new) for new in sets] == [9] * 4 and counts == [6] * 4  # 6 and 3, as labelled
    truth = {r.id: r.fields["label"] for r in unlabelled}
    share = [np.mean([truth[r.id] == r.fields["label"] for r in new]) for new in sets]
    assert set(share) <= {0.0, 1.0} and share[3] == 1.0  # nobody learns from itself
    many = new_lines(config, TASK, (labelled, unlabelled), [right] * 4, [1.0] * 4, 9)
    assert len(many[0]) == len(unlabelled)  # no more than there are, and none twice
    sure = np.where(np.arange(len(right))[:, None] < 20, right * 3, right * 0.01)
    drawn = new_lines(config, TASK, (labelled, unlabelled), [sure] * 4, [1.0] * 4, 2)
    first = {r.id for r in unlabelled[:20]}
    assert np.mean([r.id in first for new in drawn for r in new]) > 20 / len(right)


@pytest.mark.slow
def test_a_second_generation_learns_more_lines(work: Path) -> None:
    write_jsonl(work / "few.jsonl", read_lines(work / "train.jsonl")[:8])
    pet(told(work, "ipet", file=str(work / "few.jsonl"), generations=2, steps=2, distil_steps=1,
             batch_size=8))  # fmt: skip
    members = read_lines(work / "ipet" / "members.jsonl")
    assert [one["generation"] for one in members] == [0, 0, 1, 1]
    assert [one["lines"] for one in members[:2]] == [8, 8]
    assert all(8 < one["lines"] <= 40 for one in members[2:])
    assert (work / "ipet" / "members" / "pattern1_seed0_generation1" / "final").is_dir()


def test_bad_input_is_named(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"PetConfig.patterns = '\{text\} is"):
        told(work, "bad", patterns=PATTERNS[0])
    with pytest.raises(UserError, match="PetConfig.patterns = .*: expected each template once"):
        told(work, "bad", patterns=PATTERNS[:1] * 2)
    with pytest.raises(UserError, match="PetConfig.generations = 2: expected 1 where there is one"):
        told(work, "bad", patterns=(), generations=2)
    with pytest.raises(UserError, match=r"SST2Task.query_format = '\{text\}': 0 times \{mask\}"):
        pet(told(work, "bad", patterns=("{text}",)))
    write_jsonl(work / "none.jsonl", read_lines(work / "train.jsonl"))
    with pytest.raises(UserError, match=r"none.jsonl: every line is one of .*train.jsonl or"):
        pet(told(work, "bad", unlabelled_file=str(work / "none.jsonl")))
    flags = [f"--gin.{name}={work / 'x'}" for name in ("MODEL_DIR", "ENCODER", "TRAIN_FILE",
                                                       "UNLABELLED_FILE")]  # fmt: skip
    rate = "--gin.encoder/OptimizerConfig.learning_rate=1e-3"
    assert entry.main(["--gin_file=runs/pet.gin", *flags, rate]) == 2
    assert "bind PetConfig.learning_rate" in capsys.readouterr().err
