"""Classifiers: what they learn, what trains and is saved, resume, and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from atlas_jax import train_classifier as command
from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.errors import UserError
from atlas_jax.models.encoder_folder import load_encoder
from atlas_jax.models.folder import read_about
from atlas_jax.tasks.classification import SST2Task
from atlas_jax.training.classifier_config import ClassifierRun, ClassifierTrainConfig
from atlas_jax.training.classifier_scores import fit_probe, probe_logits
from atlas_jax.training.classifier_trainer import train_classifier
from atlas_jax.training.config import CheckpointConfig, OptimizerConfig
from atlas_jax.training.metrics import read_metrics
from tests.training.classified import TASK, save_tiny, write_texts
from tests.training.runs import read_lines


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, retriever_tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    save_tiny(folder / "encoder", retriever_tokenizer_file)
    save_tiny(folder / "other", retriever_tokenizer_file, seed=2)
    write_texts(folder / "train.jsonl", 64)
    write_texts(folder / "dev.jsonl", 24, seed=5)
    return folder


def told(work: Path, name: str, **fields: Any) -> ClassifierRun:
    run = {key: fields.pop(key) for key in ("delta", "checkpoints", "task") if key in fields}
    config = ClassifierTrainConfig(
        **{
            "model_dir": str(work / name), "encoder": str(work / "encoder"),
            "file": str(work / "train.jsonl"), "eval_file": str(work / "dev.jsonl"),
            "total_steps": 60, "batch_size": 16, "length": 12, "eval_batch_size": 16, **fields,
        }
    )  # fmt: skip
    optimizer = OptimizerConfig(learning_rate=1e-2, total_steps=60, weight_decay=0.1)
    return ClassifierRun(**{"task": TASK, **run}, train=config, optimizer=optimizer)


def flat(params: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep="/")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prompt", "head"])
def test_an_encoder_learns_and_its_folder_classifies_as_it_did(work: Path, method: str) -> None:
    scores = train_classifier(told(work, method, method=method))
    assert scores["accuracy"] >= 0.9
    assert read_metrics(work / method)[-1]["eval/accuracy"] == scores["accuracy"]
    rows = read_lines(work / method / "predictions" / "step_0000060.jsonl")
    right = [row["label"] == row["predicted_label"] for row in rows]
    assert sum(right) / len(right) == pytest.approx(scores["accuracy"])
    assert rows[0]["probabilities"].keys() == {"negative", "positive"}
    about = read_about(work / method / "final")
    assert (about["task"], about["method"], about["steps"]) == ("sst2", method, 60)
    # zero steps score the folder that was left
    again = told(work, f"{method}_again", method=method, total_steps=0,
                 encoder=str(work / method / "final"))  # fmt: skip
    assert train_classifier(again) == scores


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "houlsby"])
def test_what_is_frozen_stays_and_the_folder_has_what_moved(work: Path, kind: str) -> None:
    run = told(work, kind, delta=DeltaConfig(kind=kind, rank=4), total_steps=20)
    train_classifier(run)
    before, after = load_encoder(work / "encoder"), load_encoder(work / kind / "final")
    old, new = flat(before.params), flat(after.params)
    norms = {path for path in old if kind == "houlsby" and "layer_norm" in path}
    for path in old:
        moved = not np.array_equal(old[path], new[path])
        assert moved == (path.startswith("mlm/") or path in norms), path
    own = load_file(work / kind / "final" / "encoder.safetensors")
    heads = {path for path in old if path.startswith("mlm/")}
    assert set(own) == (set(new) - set(old)) | heads | norms
    assert after.deltas["encoder"]["rank"] == 4
    again = told(work, f"{kind}_again", total_steps=0, encoder=str(work / kind / "final"))
    assert train_classifier(again)["accuracy"] == read_metrics(work / kind)[-1]["eval/accuracy"]
    if kind == "adapter":
        with pytest.raises(UserError, match="stands on a encoder with the fingerprint"):
            load_encoder(work / kind / "final", base=str(work / "other"))


SOFT_TASK = dataclasses.replace(TASK, query_format="{soft} {text} {soft!2} {mask} .")
SOFT = {
    "marks": (SOFT_TASK, DeltaConfig("prompt", length=3, network="fewshot")),
    "front": (TASK, DeltaConfig("prompt", length=3)),
    "prefix": (TASK, DeltaConfig("prefix", length=3, network="mlp", width=8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SOFT))
def test_a_prompt_or_prefix_learns_and_is_saved_folded(work: Path, name: str) -> None:
    task, delta = SOFT[name]
    run = told(work, f"soft_{name}", task=task, delta=delta, total_steps=40, log_every=1)
    scores = train_classifier(run)
    before, after = load_encoder(work / "encoder"), load_encoder(work / f"soft_{name}" / "final")
    old, new = flat(before.params), flat(after.params)
    for path in old:  # the MLM head, too
        np.testing.assert_array_equal(old[path], new[path])
    own = load_file(work / f"soft_{name}" / "final" / "encoder.safetensors")
    assert set(own) == set(new) - set(old)
    prefix = {f"encoder/layers_0/attention/prefix/{half}" for half in ("key", "value")}
    table = {"encoder/embeddings/word_embeddings/prompt/table"}
    assert set(own) == (prefix if name == "prefix" else table)
    assert all(leaf.shape == (3, 16) for leaf in own.values())
    assert after.deltas["encoder"]["network"] == ""
    losses = [
        row["train/loss"] for row in read_metrics(work / f"soft_{name}") if "train/loss" in row
    ]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    about = read_about(work / f"soft_{name}" / "final")
    assert about["trained"] > 3 * 16 or name == "front"
    again = told(work, f"soft_{name}_again", task=task, total_steps=0,
                 encoder=str(work / f"soft_{name}" / "final"))  # fmt: skip
    assert train_classifier(again)["accuracy"] == scores["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "template", "count"),
    # The lama network of width 16: two BiLSTMs of 1,664 and an MLP of 544.
    [("p_tuning", "{soft!3} {text} {soft!3} {mask} {soft!3}", 9 * 16 + 2 * 1664 + 544),
     ("prefix", "{text} is {mask} .", 10 * 16 + 17 * 512 + 513 * 2 * 16)],
)  # fmt: skip
def test_the_command_says_how_many_parameters_it_trained(
    work: Path, name: str, template: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    bindings = {
        "ENCODER": work / "encoder", "MODEL_DIR": work / f"cli_{name}",
        "TRAIN_FILE": work / "train.jsonl", "SST2Task.query_format": f"'{template}'",
        "SST2Task.label_words": {"negative": "small", "positive": "large"},
        "TRAIN_STEPS": 10, "TEXT_LENGTH": 16,
    }  # fmt: skip
    flags = [f"--gin.{binding}={value}" for binding, value in bindings.items()]
    files = ["--gin_file=runs/classify.gin", f"--gin_file=deltas/{name}.gin"]
    assert command.main([*files, *flags]) == 0
    said = capsys.readouterr().out
    whole = sum(leaf.size for leaf in flat(load_encoder(work / "encoder").params).values())
    assert f"{count:,} of {whole + count:,} parameters were trained" in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "front", "prefix"])
def test_a_killed_run_goes_on_bit_for_bit(work: Path, kind: str) -> None:
    saved = CheckpointConfig(every=5, keep=3)
    delta = DeltaConfig(kind="adapter", rank=2) if kind == "adapter" else SOFT[kind][1]
    whole = told(work, f"{kind}_whole", delta=delta, checkpoints=saved, total_steps=15)
    train_classifier(whole)
    first = told(work, f"{kind}_halves", delta=delta, checkpoints=saved, total_steps=10)
    train_classifier(first)
    config = dataclasses.replace(first.train, total_steps=15)
    train_classifier(dataclasses.replace(first, train=config))
    one, other = (load_encoder(work / f"{kind}_{n}" / "final") for n in ("whole", "halves"))
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.slow
def test_a_probe_is_the_minimum_and_a_majority_is_the_commonest(work: Path) -> None:
    rng = np.random.default_rng(0)
    x_nd, labels_n = rng.normal(size=(40, 3)).astype(np.float32), rng.integers(0, 3, 40)
    kernel_dc, bias_1c = (np.asarray(w) for w in fit_probe(x_nd, labels_n, 3, decay=0.5))
    logits_nc = probe_logits((kernel_dc, bias_1c), x_nd)
    shares_nc = np.exp(logits_nc) / np.exp(logits_nc).sum(axis=1, keepdims=True)
    error_nc = shares_nc - np.eye(3)[labels_n]
    np.testing.assert_allclose(x_nd.T @ error_nc + 0.5 * kernel_dc, 0.0, atol=2e-4)
    np.testing.assert_allclose(error_nc.sum(axis=0), 0.0, atol=2e-4)
    assert train_classifier(told(work, "probe", method="probe"))["accuracy"] >= 0.5
    scores = train_classifier(told(work, "majority", method="majority"))
    assert scores == {"accuracy": 0.5, "accuracy_negative": 1.0, "accuracy_positive": 0.0}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"length": 20}, "texts of 20 tokens: the encoder reads at most 16"),
        ({"length": 4}, r"train.jsonl:1: what has to stay whole of its prompt takes more than 4"),
        ({"train": ["decoder/*"]}, r"ClassifierTrainConfig.train: 'decoder/\*' is the path of no"),
        ({"method": "head", "total_steps": 0}, "its encoder has no sentence head"),
        ({"task": SST2Task()}, "label 'negative': the word 'terrible' is .* tokens"),
        ({"task": SOFT_TASK}, r"has 3 {soft} marks, but the encoder's prompt has 0 vectors"),
        ({"delta": DeltaConfig("prompt", length=9)}, "12 tokens have no room behind a prompt of 9"),
    ],
)
def test_bad_input_is_named(work: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        train_classifier(told(work, "bad", **fields))
    with pytest.raises(UserError, match="ClassifierTrainConfig.eval_file"):
        told(work, "bad", eval_file="", method="probe")
