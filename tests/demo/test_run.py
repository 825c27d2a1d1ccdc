"""The whole demo on a few passages: once with stand-ins for the entry points, once in earnest."""

import json

import pytest

from atlas_jax import evaluate, index_command, train_retriever
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import read_jsonl, write_jsonl
from atlas_jax.demo import commands, factbook, run
from atlas_jax.demo.paths import nano_checkpoint
from tests.demo.small import PASSAGES, QUESTIONS, prepare_small, tiny_checkpoint


@pytest.fixture
def small_factbook(monkeypatch):
    monkeypatch.setattr(factbook, "prepare", prepare_small)


def _value(arguments, name):
    found = [a.split("=", 1)[1] for a in arguments if a.startswith(f"--gin.{name}=")]
    return found[-1].strip('"') if found else None


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Entry points that note their arguments and write predictions as the real ones do."""
    made = []

    def answered(passages=True):
        shown = [{**p, "score": 1.0} for p in PASSAGES[: len(QUESTIONS)]] if passages else []
        for n, q in enumerate(QUESTIONS):
            first = [shown[n], *(p for p in shown if p is not shown[n])] if shown else []
            yield {**q, "prediction": q["answers"][0], "passages": first}

    def fake_train(arguments):
        made.append(("train", arguments))
        closed = _value(arguments, "EvalConfig.passages") == "none"
        folder = tmp_path / "out" / _value(arguments, "MODEL_DIR").rsplit("/", 1)[1]
        write_jsonl(folder / "predictions" / "step_0000003.jsonl", answered(not closed))
        return 0

    def evaluate_main(arguments):
        made.append(("evaluate", arguments))
        asked = [r for _, r in read_jsonl(_value(arguments, "EVAL_FILE"))]
        if _value(arguments, "EvalConfig.generate") == "False":
            rows = [{k: v for k, v in r.items() if k != "prediction"} for r in answered()]
        else:
            rows = [{**r, "prediction": r["answers"][0], "passages": []} for r in asked]
        write_jsonl(_value(arguments, "PREDICTIONS"), rows)
        return 0

    monkeypatch.setattr(run, "build_index_main", lambda a: made.append(("build_index", a)) or 0)
    monkeypatch.setattr(run, "train_main", fake_train)
    monkeypatch.setattr(train_retriever, "main", lambda a: made.append(("train_retriever", a)) or 0)
    monkeypatch.setattr(evaluate, "main", evaluate_main)
    monkeypatch.setattr(index_command, "main", lambda a: made.append(("index", a)) or 0)
    return made


def test_every_stage_runs_and_the_results_are_what_was_measured(
    small_factbook, calls, tmp_path, capsys
):
    out = tmp_path / "out"
    assert run.main(["--out", str(out), "--checkpoint", "nano/x", "--gin.TRAIN_STEPS=3"]) == 0
    assert [name for name, _ in calls] == [
        "build_index", "evaluate", "train", "train_retriever", "build_index",
        "train", "train", "train", "train", "index", "evaluate", "index",
    ]  # fmt: skip
    swapped, restored = ([*read_jsonl(a[1])] for name, a in calls if name == "index")
    assert [one["id"] for _, one in swapped] == [one["id"] for _, one in restored]
    assert [one for _, one in restored] != [one for _, one in swapped]
    assert all(one in PASSAGES for _, one in restored)
    trained = [arguments for name, arguments in calls if name == "train"]
    [find] = [arguments for name, arguments in calls if name == "train_retriever"]
    read, *trained = trained
    for teaching in (read, find):
        assert _value(teaching, "QUESTION_FILE") == _value(trained[0], "TRAIN_FILE")
        assert _value(teaching, "TRAIN_FILE").endswith("passages_pretraining.jsonl")
    assert all(_value(a, "TRAIN_STEPS") == "3" for a in trained)
    assert [_value(a, "MODEL_DIR").rsplit("/", 1)[1] for a in trained] == [
        "closed_book", "fixed_retriever", "taught_retriever", "jointly_trained",
    ]  # fmt: skip
    assert [_value(a, "RETRIEVER_TRAINING") for a in trained] == ["fixed", "fixed", "fixed", None]
    can_read, can_find = (_value(a, "MODEL_DIR") + "/final" for a in (read, find))
    readers = [_value(a, "INITIAL_CHECKPOINT_PATH") for a in trained]
    assert readers == ["nano/x", can_read, can_read, can_read]
    retrievers = [_value(a, "ModelConfig.retriever") for a in trained]
    assert retrievers == ["nano/x", "nano/x", can_find, can_find]
    indices = [_value(a, "INDEX") for name, a in calls if name == "build_index"]
    assert [_value(a, "INDEX") for a in trained] == [indices[0], *indices, indices[1]]
    shared = {"TRAIN_FILE", "EVAL_FILE", "STORE", "TrainConfig.seed"}
    for name in shared:
        assert len({_value(a, name) for a in trained}) == 1, name
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row["scores"] for row in results["rows"]}
    assert rows["closed book"] == {"exact_match": 100.0, "f1": 100.0}
    assert rows["jointly trained"]["recall@1"] == 100.0
    assert set(rows["BM25"]) == set(rows["untrained retriever"])
    assert results["swaps"][0]["follows"] and (out / "demo.png").is_file()
    assert set(results["seconds"]) == {
        *run.MODES,
        run.PREPARE,
        run.INDEX,
        run.BEFORE,
        run.READ,
        run.FIND,
        run.SWAP,
        "all",
    }
    printed = capsys.readouterr().out
    for part in ("10/10", "$ atlas-jax train", "index swap", "jointly trained", "results.json"):
        assert part in printed


def test_a_stage_that_fails_ends_the_demo(small_factbook, calls, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "train_main", lambda arguments: 2)
    assert run.main(["--out", str(tmp_path / "out"), "--checkpoint", "nano"]) == 2
    assert "`atlas-jax train` ended with exit code 2" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert run.main(["--out", str(tmp_path), "--checkpoint", "nano"]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").is_file()


def test_the_demos_own_folder_is_made_anew(tmp_path):
    run.clear(tmp_path / "out")
    (tmp_path / "out" / "old.txt").touch()
    run.clear(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [run.MARKER]


def test_a_missing_nano_model_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("atlas_jax.__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UserError, match="--checkpoint"):
        nano_checkpoint()


@pytest.mark.slow
def test_the_demo_runs_through_the_real_entry_points(
    small_factbook, reader_tokenizer_file, retriever_tokenizer_file, tmp_path, monkeypatch
):
    teach, few = commands.teach, ["TRAIN_STEPS=2", "WARMUP_STEPS=0", "BATCH_SIZE=8"]
    monkeypatch.setattr(
        commands, "teach", lambda *which: [*teach(*which), *(f"--gin.{one}" for one in few)]
    )
    checkpoint = tiny_checkpoint(
        tmp_path / "model", reader_tokenizer_file, retriever_tokenizer_file
    )
    out = tmp_path / "out"
    code = run.main([
        "--out", str(out), "--checkpoint", str(checkpoint), "--gin.TRAIN_STEPS=2",
        "--gin.WARMUP_STEPS=0", "--gin.K=2", "--gin.TEXT_LENGTH=64",
    ])  # fmt: skip
    assert code == 0
    rows = {r["name"]: r["scores"] for r in json.loads((out / "results.json").read_text())["rows"]}
    # This retriever is never trained: its recall before and after is one and the same.
    fixed = {k: v for k, v in rows["fixed retriever"].items() if k.startswith("recall")}
    assert fixed == rows["untrained retriever"]
    assert set(rows["closed book"]) == {"exact_match", "f1"}
