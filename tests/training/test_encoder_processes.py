"""Two local processes pretrain an encoder and teach a classifier as one does."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

from atlas_jax.models.encoder_folder import load_encoder
from atlas_jax.training.metrics import read_metrics
from tests.training.classified import save_tiny, write_texts
from tests.training.runs import read_lines
from tests.training.test_encoder_trainer import texts
from tests.training.test_processes import begin, finish

__all__ = ["texts"]  # a fixture


def agree(alone: Path, together: Path, names: tuple[str, ...]) -> None:
    """The same metrics and the same parameters, but for the order in which sums are taken."""
    rows = [read_metrics(run) for run in (alone, together)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for name in names:
        values = [[row[name] for row in run if name in row] for run in rows]
        assert values[0], name
        np.testing.assert_allclose(values[0], values[1], rtol=1e-4, atol=1e-6, err_msg=name)
    one, other = (flat(load_encoder(run / "final").params) for run in (alone, together))
    assert set(one) == set(other)
    for path, leaf in one.items():
        np.testing.assert_allclose(leaf, other[path], rtol=1e-3, atol=1e-4, err_msg=path)


def flat(params: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")


@pytest.mark.slow
def test_two_processes_pretrain_as_one_does(texts: Path, tmp_path: Path) -> None:
    bindings = [
        f"TOKENIZER='{texts}/tokenizer.json'", f"PASSAGES='{texts}/passages.jsonl'",
        f"EVAL_FILE='{texts}/passages.jsonl'", "VOCAB_SIZE=57", "TRAIN_STEPS=4",
        "WARMUP_STEPS=1", "BATCH_SIZE=8", "LENGTH=20", "EncoderModelConfig.hidden_dim=8",
        "EncoderModelConfig.num_layers=2",
        "EncoderModelConfig.num_heads=2", "EncoderModelConfig.mlp_dim=16",
        "EncoderModelConfig.max_positions=24", "EncoderTrainConfig.log_every=1",
        "MASKING='span'", "OBJECTIVES=('mlm', 'sbo', 'sop')", "CHECKPOINT_EVERY=2",
        "MeshConfig.data=2", "MeshConfig.fsdp=2", "EncoderTrainConfig.eval_rows=16",
    ]  # fmt: skip
    runs = []
    for count, name in ((1, "alone"), (2, "together")):
        runs.append(tmp_path / name)
        own = [*bindings, f"MODEL_DIR='{runs[-1]}'"]
        printed = finish(begin("pretrain_encoder", "runs/albert_small.gin", own, count))
        assert not any("4/4" in output for output in printed[1:])  # one of them reports
    agree(*runs, ("train/mlm_loss", "train/sbo_loss", "train/sop_loss", "eval/loss"))


@pytest.mark.slow
def test_two_processes_classify_as_one_does(tmp_path: Path, retriever_tokenizer_file: Path) -> None:
    save_tiny(tmp_path / "encoder", retriever_tokenizer_file)
    write_texts(tmp_path / "train.jsonl", 16)
    write_texts(tmp_path / "dev.jsonl", 10, seed=5)
    bindings = [
        f"ENCODER='{tmp_path}/encoder'", f"TRAIN_FILE='{tmp_path}/train.jsonl'",
        f"EVAL_FILE='{tmp_path}/dev.jsonl'", "TRAIN_STEPS=4", "BATCH_SIZE=8", "EVAL_BATCH_SIZE=8",
        "TEXT_LENGTH=16", "LOG_EVERY=1", "LEARNING_RATE=1e-2", "MeshConfig.data=4",
        "SST2Task.query_format='{text} {mask}'", "DEMONSTRATIONS='similar'",
        "SST2Task.label_words={'negative': 'small', 'positive': 'large'}",
        "DemonstrationConfig.draws=2", "encoder/DeltaConfig.kind='adapter'",
    ]  # fmt: skip
    runs = []
    for count, name in ((1, "alone"), (2, "together")):
        runs.append(tmp_path / name)
        own = [*bindings, f"MODEL_DIR='{runs[-1]}'"]
        finish(begin("train_classifier", "runs/classify.gin", own, count))
    agree(*runs, ("train/loss", "eval/accuracy"))
    file = Path("predictions") / "step_0000004.jsonl"
    one, other = (read_lines(run / file) for run in runs)
    assert [row["predicted_label"] for row in one] == [row["predicted_label"] for row in other]
