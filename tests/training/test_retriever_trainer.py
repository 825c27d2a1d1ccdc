"""Contrastive pretraining as a run: what an interrupted one leaves behind, and resumes."""

from pathlib import Path

import pytest

from atlas_jax import train_retriever
from atlas_jax.training.metrics import read_metrics
from tests.training.runs import write_run


def run(gin_file: Path, name: str, steps: int, *bindings: str) -> int:
    settings = (
        f"RetrieverTrainConfig.model_dir='{gin_file.parent / name}'",
        f"RetrieverTrainConfig.total_steps={steps}",
        "RetrieverTrainConfig.batch_size=8",
        "RetrieverTrainConfig.log_every=1",
        "ContrastiveConfig.queue_size=16",
        "CheckpointConfig.every=2",
        *bindings,
    )
    return train_retriever.main(
        [f"--gin_file={gin_file}", *(f"--gin.{setting}" for setting in settings)]
    )


@pytest.mark.slow
def test_an_interrupted_pretraining_repeats_the_whole_one(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    assert run(gin_file, "whole", 5) == 0
    for steps in (3, 5):
        assert run(gin_file, "parts", steps) == 0
    weights = [
        (tmp_path / name / "final" / "retriever.safetensors").read_bytes()
        for name in ("whole", "parts")
    ]
    assert weights[0] == weights[1]
    losses = [
        [row["train/loss"] for row in read_metrics(tmp_path / name)] for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


def test_a_batch_that_repeats_a_passage_is_refused(
    tmp_path: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    batch = "RetrieverTrainConfig.batch_size=24"
    assert run(gin_file, "run", 1, batch, "ContrastiveConfig.queue_size=24") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "RetrieverTrainConfig.batch_size = 24 is more than the 16 passages" in error
