"""However a run ends, what it has learnt is kept; and it goes on only as it was begun."""

from pathlib import Path

import jax
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.train import main as train_main
from atlas_jax.training import trainer
from atlas_jax.training.provenance import check_learnt, check_resumed, file_mark
from tests.training.runs import read_lines, write_lines, write_run


@pytest.fixture
def gin_file(tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path) -> Path:
    made = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    rows = read_lines(tmp_path / "train.jsonl")
    write_lines(
        tmp_path / "train.jsonl",
        [{**row, "id": f"{row['id']}{n}"} for n in range(3) for row in rows],
    )
    return made


def run(gin_file: Path, *bindings: str) -> int:
    return train_main(
        [
            f"--gin_file={gin_file}",
            f"--gin.TrainConfig.model_dir={gin_file.parent / 'run'}",
            "--gin.TrainConfig.total_steps=2",
            "--gin.TrainConfig.passages='none'",
            "--gin.EvalConfig.passages='none'",
            "--gin.StepConfig.retriever_training=fixed",
            *(f"--gin.{binding}" for binding in bindings),
        ]
    )


def saved(gin_file: Path) -> list[str]:
    folder = gin_file.parent / "run" / "checkpoints"
    return sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []


def test_a_record_that_cannot_be_evaluated_is_told_before_the_first_step(gin_file, capsys):
    rows = read_lines(gin_file.parent / "test.jsonl")
    rows[0]["choices"] = ["a", "b"]
    write_lines(gin_file.parent / "test.jsonl", rows)
    assert run(gin_file) == 2
    error = capsys.readouterr().err
    assert "record 'q6' has 0 choices; all records of a file have two or more" in error
    assert not (gin_file.parent / "run" / "metrics.jsonl").exists()
    assert saved(gin_file) == []


def test_a_training_record_that_makes_no_batch_is_told_before_the_first_step(gin_file, capsys):
    rows = read_lines(gin_file.parent / "train.jsonl")
    del rows[3]["passages"]
    write_lines(gin_file.parent / "train.jsonl", rows)
    assert run(gin_file, "TrainConfig.passages=file", "EvalConfig.file=''") == 2
    assert "record 'q30' has no field 'passages'" in capsys.readouterr().err


def test_where_nothing_can_be_written_is_told_first(gin_file, monkeypatch, capsys):
    (gin_file.parent / "run").write_text("a file")
    monkeypatch.setattr(trainer, "open_models", None)  # would be called to load the models
    assert run(gin_file) == 2
    assert "TrainConfig.model_dir" in (error := capsys.readouterr().err)
    assert "is a file; choose a folder" in error


@pytest.mark.slow
@pytest.mark.parametrize("error", [UserError("spoilt"), KeyboardInterrupt(), ZeroDivisionError()])
def test_an_error_behind_the_last_step_loses_nothing(gin_file, error, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(trainer, "_evaluate", fail)
    if isinstance(error, ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            run(gin_file, "CheckpointConfig.every=0")
    else:
        assert run(gin_file, "CheckpointConfig.every=0") in (2, 130)
        assert "Traceback" not in capsys.readouterr().err
    assert saved(gin_file) == ["2"]
    assert (gin_file.parent / "run" / "final" / "reader.safetensors").is_file()


@pytest.mark.slow
def test_a_run_that_skips_every_step_fails(gin_file, monkeypatch, capsys):
    real = trainer.make_state

    def spoilt(models, params, *rest):
        params = {
            **params,
            "reader": jax.tree.map(lambda leaf: leaf * float("nan"), params["reader"]),
        }
        return real(models, params, *rest)

    monkeypatch.setattr(trainer, "make_state", spoilt)
    assert run(gin_file, "EvalConfig.file=''") == 2
    assert "every one of the 2 steps was skipped" in capsys.readouterr().err
    assert not (gin_file.parent / "run" / "final").exists()


@pytest.mark.slow
def test_a_run_goes_on_only_as_it_was_begun(gin_file, capsys):
    assert run(gin_file, "EvalConfig.file=''") == 0
    config = (gin_file.parent / "run" / "config.gin").read_bytes()
    longer = ("EvalConfig.file=''", "TrainConfig.total_steps=3")
    capsys.readouterr()
    other = gin_file.parent / "other.jsonl"
    write_lines(other, read_lines(gin_file.parent / "train.jsonl")[:17])
    for binding, message in (
        ("DataConfig.batch_size=16", "DataConfig.batch_size = 16, but the run in"),
        ("TrainConfig.seed=7", "TrainConfig.seed = 7, but the run in"),
        (f"TrainConfig.file={other}", "TrainConfig.file = 'other.jsonl, "),
    ):
        assert run(gin_file, *longer, binding) == 2
        error = capsys.readouterr().err
        assert message in error and "was begun with" in error
        assert (gin_file.parent / "run" / "config.gin").read_bytes() == config
    moved = gin_file.parent / "moved.jsonl"
    (gin_file.parent / "train.jsonl").rename(moved)
    assert run(gin_file, *longer, f"TrainConfig.file={moved}") == 0, capsys.readouterr().err


def test_what_a_run_was_begun_with_is_told_beside_what_is_given():
    check_resumed(None, {"TrainConfig.seed": 1}, "run")  # a checkpoint of an older version
    check_resumed({"f": "a, 5 bytes, 1"}, {"f": "b, 5 bytes, 1"}, "run")
    with pytest.raises(UserError, match=r"TrainConfig\.seed = 2, .* in run was begun with 1"):
        check_resumed({"TrainConfig.seed": 1}, {"TrainConfig.seed": 2}, "run")


def test_the_mark_of_a_file_is_of_its_content(tmp_path):
    one, other = tmp_path / "a", tmp_path / "b"
    for content, changed in ((b"x" * 10, 5), (b"x" * (5 << 20), (5 << 20) - 1)):
        one.write_bytes(content)
        other.write_bytes(content)
        assert file_mark(one).partition(", ")[2] == file_mark(other).partition(", ")[2]
        other.write_bytes(content[:changed] + b"y" + content[changed + 1 :])
        assert file_mark(one).partition(", ")[2] != file_mark(other).partition(", ")[2]


def test_a_run_with_one_good_step_has_learnt():
    check_learnt(3, 2)
    check_learnt(0, 0)
    with pytest.raises(UserError, match="every one of the 3 steps was skipped"):
        check_learnt(3, 3)


@pytest.mark.slow
def test_what_is_cut_is_told(gin_file, capsys):
    rows = read_lines(gin_file.parent / "train.jsonl")
    rows[0]["question"] = "why " * 100
    rows[1]["answers"] = ["long " * 40]
    write_lines(gin_file.parent / "train.jsonl", rows)
    assert run(gin_file, "TrainConfig.total_steps=1", "EvalConfig.file=''") == 0
    error = capsys.readouterr().err
    assert "1 of 18 questions are cut to DataConfig.query_length = 64 tokens (the longest" in error
    assert "1 of 18 retriever's questions are cut to DataConfig.retriever_query_length" in error
    assert "answers are cut to DataConfig.target_length = 8 tokens" in error
    assert "only their beginnings are learnt" in error
