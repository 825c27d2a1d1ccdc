"""`self_train` of a reader with retrieval in the loop: what it learns, resume, what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from atlas_jax import from_gin
from atlas_jax import self_train as entry
from atlas_jax.core import trees
from atlas_jax.core.config import load_gin, write_config
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.models.folder import load_model, read_about
from atlas_jax.tasks.fever import FeverTask
from atlas_jax.training import self_training
from atlas_jax.training.metrics import read_metrics
from atlas_jax.training.self_training import self_train
from atlas_jax.training.self_training_config import ReaderSelfTrainingRun
from atlas_jax.training.self_training_step import distillation, row_weights
from atlas_jax.training.taught_reader import taught_reader
from tests.training.claims import save_pair, told, write_claims
from tests.training.runs import read_lines
from tests.training.test_self_training import SPREAD, check_start


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
) -> Path:
    folder = tmp_path_factory.mktemp("self_training_reader")
    write_claims(folder)
    save_pair(folder / "pair", reader_tokenizer_file, retriever_tokenizer_file)
    return folder


class _Killed(Exception):
    pass


LONG: dict[str, Any] = {
    "teacher_steps": 30, "kd_steps": 10, "meta_steps": 6, "tune_steps": 10, "log_every": 4,
}  # fmt: skip


@pytest.mark.slow
def test_a_student_answers_by_what_is_found_and_a_killed_run_repeats_itself(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = self_train(told(work, "whole", **LONG))
    assert scores["accuracy"] >= 0.75  # half of the claims are true
    rows = read_lines(work / "whole" / "predictions" / "step_0000056.jsonl")
    for row in rows:  # also where another country's passage was found
        large = "zz" in row["passages"][0]["text"]
        assert row["predicted_label"] == ("SUPPORTS" if large else "REFUTES")
    assert read_metrics(work / "whole")[-1]["eval/accuracy"] == scores["accuracy"]

    place, seen = self_training._placed, []

    def killing(run: Any, rows: Any) -> Any:
        seen.append(rows)
        if len(seen) == 44:  # in the meta phase
            raise _Killed
        return place(run, rows)

    monkeypatch.setattr(self_training, "_placed", killing)
    with pytest.raises(_Killed):
        self_train(told(work, "killed", every=41, **LONG))
    monkeypatch.setattr(self_training, "_placed", place)
    assert self_train(told(work, "killed", every=41, **LONG)) == scores
    final = "final/reader.safetensors"
    assert (work / "whole" / final).read_bytes() == (work / "killed" / final).read_bytes()

    about = read_about(work / "whole" / "final")
    assert (about["task"], about["steps"], about["skipped"]) == ("fever", 56, 0)
    assert about["trained"] < 0.2 * about["parameters"]
    own, base = (load_model(work / name, ("reader",))["reader"].params
                 for name in ("whole/final", "pair"))  # fmt: skip
    flat = traverse_util.flatten_dict(own, sep="/")
    for path, leaf in traverse_util.flatten_dict(base, sep="/").items():
        np.testing.assert_array_equal(flat[path], leaf)  # all but the adapters is frozen
    assert not load_file(work / "whole" / "final" / "retriever.safetensors")  # it stood still


def test_a_run_begins_in_its_shards(work: Path) -> None:
    check_start(told(work, "unused", devices=SPREAD), work / "unused")


def test_weights_of_claims_are_products_of_their_gradients(work: Path) -> None:
    run = told(work, "weights", pseudo_labels="soft")
    with use_devices(run.devices) as (mesh, rules):
        taught = taught_reader(run, work / "weights", mesh, rules)
        params = taught.start()
        taught.opened(params)
        moving, frozen = trees.split(params, taught.patterns)
        # Larger than they begin, so that products of gradients are no rounding.
        moving = jax.tree.map(lambda x: 300 * jnp.asarray(x), moving)
        few, many = (
            taught.found(frozen, jax.device_put(lines.rows(np.arange(8))))
            for lines in (taught.labelled, taught.unlabelled)
        )

        def logits(moving: Any, rows: Any) -> jax.Array:
            return taught.logits(trees.joined(moving, frozen), rows, None)

        def losses(moving: Any) -> jax.Array:
            said_uc = jax.random.normal(jax.random.key(0), (8, 3))
            return distillation(said_uc, logits(moving, many))

        def labelled(moving: Any) -> jax.Array:
            classes = jnp.asarray(few.labels_b)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits(moving, few), classes
            ).mean()

        eta = 0.1
        weights_u = jax.jit(lambda p: row_weights(losses, labelled, p, eta))(moving)
        of_row = jax.jit(jax.jacrev(losses))(moving)
        towards = jax.jit(jax.grad(labelled))(moving)
        products_u = jax.vmap(lambda row: optax.tree.vdot(row, towards))(of_row)
        useful_u = np.maximum(eta * np.asarray(products_u), 0.0)
        assert 0 < (useful_u > 0).sum() < 8
        wanted_u = useful_u / (useful_u.sum() + 1e-6)
        np.testing.assert_allclose(weights_u, wanted_u, rtol=1e-4, atol=1e-6)


def bindings(work: Path, name: str) -> dict[str, str]:
    return {
        "MODEL_DIR": f"'{work / name}'", "INITIAL_CHECKPOINT_PATH": f"'{work / 'pair'}'",
        "TRAIN_FILE": f"'{work / 'few.jsonl'}'", "UNLABELLED_FILE": f"'{work / 'many.jsonl'}'",
        "EVAL_FILE": f"'{work / 'dev.jsonl'}'", "STORE": f"'{work / 'gin_store'}'",
        "PASSAGES": f"'{work / 'passages.jsonl'}'", "K": "2", "ROUNDS": "1", "TEACHER_STEPS": "1",
        "KD_STEPS": "2", "META_STEPS": "2", "TUNE_STEPS": "1", "BATCH_SIZE": "8",
        "UNLABELLED_BATCH_SIZE": "8", "SelfTrainConfig.eval_batch_size": "8",
        "reader/DeltaConfig.rank": "2", "TEXT_LENGTH": "96", "PASSAGE_LENGTH": "40",
        "StoreConfig.retriever_length": "40", "QUERY_LENGTH": "48", "TARGET_LENGTH": "8",
    }  # fmt: skip


def command(work: Path, name: str, *more: str) -> int:
    told = [f"--gin.{key}={value}" for key, value in bindings(work, name).items()]
    return entry.main(["--gin_file=runs/list_claims.gin", *told, *(f"--gin.{one}" for one in more)])


def test_the_command_refuses_what_does_not_fit(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {
        "reader/OptimizerConfig.learning_rate=1e-3": "bind SelfTrainConfig.student_learning_rate",
        "FeverTask.answer_by='generation'": "FeverTask.answer_by = 'generation': expected",
        "SelfTrainConfig.task='qa'": "SelfTrainConfig.task = 'qa': a reader is taught a task of",
        "StepConfig.retriever_training='joint'": "expected 'fixed': self-training teaches the",
        "StepConfig.accumulate=2": "StepConfig.accumulate = 2: expected no value in a run of self",
        "SelfTrainConfig.train=['reader/nothing/*']": "SelfTrainConfig.train: 'reader/nothing/*'",
        "SelfTrainConfig.train=['retriever/*']": "SelfTrainConfig.train: 'retriever/*' is the",
        "retriever/DeltaConfig.kind='lora'": "the retriever does not train",
        "SelfTrainConfig.pseudo_labels='firm'": "SelfTrainConfig.pseudo_labels = 'firm'",
        "PASSAGE_SOURCE='web'": "SelfTrainConfig.passages = 'web'",
        "K=99": "StepConfig.k asks for 99 passages, but the corpus has 8",
    }
    for binding, message in bad.items():
        assert command(work, "bad", binding) == 2
        assert message in capsys.readouterr().err
    few = read_lines(work / "few.jsonl")
    write_jsonl(work / "odd.jsonl", [*few[:2], {"claim": "Arvo", "label": "PERHAPS"}])
    assert command(work, "bad", f"TRAIN_FILE='{work / 'odd.jsonl'}'") == 2
    assert "odd.jsonl:3: field 'label' is 'PERHAPS', expected one of" in capsys.readouterr().err


def test_a_python_run_is_written_as_a_gin_file_that_repeats_it(work: Path) -> None:
    run = told(work, "x", rounds=2)
    write_config(work / "python.gin", self_training.as_gin(run))
    load_gin([str(work / "python.gin")])
    again: Any = from_gin.self_training_run()
    for name in ("train", "task", "step", "data", "generation", "corpus", "checkpoints"):
        assert getattr(again, name) == getattr(run, name), name
    assert again.models.deltas["reader"] == run.models.deltas["reader"]
    with pytest.raises(UserError, match=r"SelfTrainConfig.encoder = 'e': expected '', where a"):
        dataclasses.replace(run, train=dataclasses.replace(run.train, encoder="e"))
    made = ReaderSelfTrainingRun.from_folder(work / "pair", run.train)
    assert (made.task.name, made.task.answer_by) == ("fever", "likelihood")
    with pytest.raises(UserError, match=r"SelfTrainConfig.task = 'qa': a reader is taught a task"):
        ReaderSelfTrainingRun.from_folder(work / "pair", dataclasses.replace(run.train, task="qa"))
    with pytest.raises(UserError, match=r"FeverTask.answer_by = 'generation'"):
        dataclasses.replace(run, task=FeverTask())
