"""Runs in every mode, and what a run refuses."""

from pathlib import Path

import pytest

from atlas_jax.train import main as train_main
from atlas_jax.training.metrics import read_metrics
from tests.training.runs import read_lines, write_run


@pytest.fixture
def gin_file(tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path) -> Path:
    return write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)


def run(gin_file: Path, *bindings: str) -> int:
    model_dir = gin_file.parent / "run"
    return train_main(
        [
            f"--gin_file={gin_file}",
            f"--gin.TrainConfig.model_dir={model_dir}",
            "--gin.TrainConfig.total_steps=2",
            *(f"--gin.{binding}" for binding in bindings),
        ]
    )


# Long enough for two inputs of 113 tokens, so that three passages share two rows.
PACKED = ("StepConfig.packed_rows=-1", "StepConfig.reader_length=226")
MODES = {
    "query_side": PACKED,
    "fixed, searched on the host": (
        "StepConfig.retriever_training=fixed",
        "CorpusConfig.searcher=scann",
    ),
    "file": (
        "TrainConfig.passages=file",
        "EvalConfig.passages=file",
        "StepConfig.retriever_training=joint",
        *PACKED,
    ),
    "closed_book": (
        "TrainConfig.passages='none'",
        "EvalConfig.passages='none'",
        "StepConfig.retriever_training=fixed",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_evaluates_and_exports(
    gin_file: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(gin_file, *MODES[mode]) == 0, capsys.readouterr().err
    learns = mode in ("query_side", "file")
    # Told for the training and for its evaluation.
    shared = "of 226 tokens each on average: they share 2 rows (StepConfig.packed_rows)"
    assert capsys.readouterr().err.count(shared) == 2 * learns
    model_dir = gin_file.parent / "run"
    assert (model_dir / "final" / "reader.safetensors").is_file()
    assert "TrainConfig.total_steps = 2" in (model_dir / "config.gin").read_text()

    trained = [row for row in read_metrics(model_dir) if "train/reader_loss" in row]
    assert [row["step"] for row in trained] == [1, 2]
    assert all(row["train/reader_loss"] > 0 and row["train/skipped"] == 0 for row in trained)
    assert [row.get("train/packed") for row in trained] == [1.0 if learns else None] * 2
    losses = [row["train/retriever_loss"] for row in trained]
    assert [loss > 0 for loss in losses] == [learns, learns], losses

    (scores,) = [row for row in read_metrics(model_dir) if "eval/exact_match" in row]
    assert ("eval/recall@1" in scores) == (mode != "closed_book")
    predictions = read_lines(model_dir / "predictions" / "step_0000002.jsonl")
    assert [row["id"] for row in predictions] == ["q5", "q6", "q7"]
    for row in predictions:
        assert isinstance(row["prediction"], str)
        assert row["answers"]
        assert len(row["passages"]) == {"closed_book": 0, "file": 2}.get(mode, 5)
        for passage in row["passages"]:
            assert set(passage) == {"id", "title", "section", "text", "score"}
        ordered = [passage["score"] for passage in row["passages"]]
        assert ordered == sorted(ordered, reverse=True)


@pytest.mark.slow
def test_steps_that_are_not_finite_are_counted_and_told(
    gin_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ("reader/OptimizerConfig.learning_rate=1e38", "reader/OptimizerConfig.clip_norm=0.0")
    assert run(gin_file, "TrainConfig.total_steps=3", *rates, "EvalConfig.file=''") == 0
    assert "2 of 3 steps were skipped: loss or gradient not finite" in capsys.readouterr().out
    rows = read_metrics(gin_file.parent / "run")
    assert [row["train/skipped"] for row in rows] == [0, 1, 2]


REFUSED = {
    "StepConfig.k asks for 17 passages, but the corpus has 16": ("StepConfig.k=17",),
    "EvalConfig.k asks for 20 passages, but the corpus has 16": (
        "EvalConfig.k=20",
        "TrainConfig.passages='none'",
        "StepConfig.retriever_training=fixed",
    ),
    "StepConfig.retriever_training = 'query_side': without passages": (
        "TrainConfig.passages='none'",
    ),
    "RefreshPolicy.schedule keeps the index fresh, but nothing makes it stale": (
        "RefreshPolicy.schedule='10'",
    ),
    "StalenessConfig.every keeps the index fresh, but nothing makes it stale": (
        "StalenessConfig.every=10",
        "StalenessConfig.k=2",
    ),
    "CorpusConfig.searcher = 'scann' can only be built anew as a whole": (
        "RefreshPolicy.rolling_rows=4",
        "CorpusConfig.searcher=scann",
        "StepConfig.retriever_training=joint",
    ),
    "RefreshPolicy.rolling_rows = 17 is more than the 16 passages": (
        "RefreshPolicy.rolling_rows=17",
        "StepConfig.retriever_training=joint",
    ),
    "StalenessConfig.k = 17 is more than the 16 passages": (
        "StalenessConfig.every=1",
        "StalenessConfig.k=17",
        "StepConfig.retriever_training=joint",
    ),
    "StepConfig.rerank asks for 20 passages, but the corpus has 16": (
        "StepConfig.rerank=20",
        "StepConfig.retriever_training=joint",
    ),
    "StepConfig.rerank = 20: TrainConfig.passages = 'file' searches nothing": (
        "StepConfig.rerank=20",
        "StepConfig.retriever_training=joint",
        "TrainConfig.passages=file",
    ),
    "DataConfig.batch_size = 3 does not divide over the 8 parts": ("DataConfig.batch_size=3",),
    "CorpusConfig.recall_target = 1.5: expected a finite number, more than 0, at most 1": (
        "CorpusConfig.recall_target=1.5",
    ),
    "CorpusConfig.dtype = 'int8': expected 'float32' or 'bfloat16' with CorpusConfig.searcher": (
        "CorpusConfig.dtype=int8",
        "CorpusConfig.searcher=scann",
    ),
    "CorpusConfig.store is not given": ("CorpusConfig.store=''",),
    "CorpusConfig.reader_states = 'gs://b/states': expected a folder on a disk": (
        "CorpusConfig.reader_states=gs://b/states",
    ),
    "TrainConfig.passages = 'wikipedia': expected one of 'index', 'file', 'none'": (
        "TrainConfig.passages=wikipedia",
    ),
    "no task is called 'qaa'; did you mean qa?": ("TrainConfig.task=qaa",),
    "nowhere.jsonl: no such file": ("TrainConfig.file=nowhere.jsonl",),
    "nowhere is not a model folder": (
        "ModelConfig.reader=nowhere",
        "ModelConfig.reader_tokenizer=''",
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_cannot_be_are_refused_in_one_line(
    gin_file: Path, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(gin_file, *REFUSED[message]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("atlas-jax train: error: ")
    assert message in last


@pytest.mark.slow
def test_a_run_of_another_model_is_refused_by_the_first_parameter(
    gin_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = (*MODES["closed_book"], "EvalConfig.file=''")
    assert run(gin_file, "TrainConfig.total_steps=1", *quick) == 0
    config = (gin_file.parent / "run" / "config.gin").read_text()
    assert run(gin_file, "ReaderConfig.mlp_dim=48", *quick) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "is of another model: params/reader/decoder/" in error
    assert "float32[16,32] there and float32[16,48] here" in error
    assert (gin_file.parent / "run" / "config.gin").read_text() == config
