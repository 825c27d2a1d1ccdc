"""The whole demo on a few passages: once with stand-ins for the entry points, once in earnest."""

import json
from pathlib import Path

import pytest

from atlas_jax import evaluate, index_command, mini, train_retriever
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import read_jsonl, write_jsonl
from atlas_jax.demo import commands, factbook, recipes, run
from atlas_jax.demo.corpora import own_files
from atlas_jax.demo.paths import nano_checkpoint
from atlas_jax.demo.recipes import NANO
from tests.demo.small import COUNTRIES, PASSAGES, QUESTIONS, prepare_small, tiny_checkpoint


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
        (Path(_value(arguments, "MODEL_DIR")) / "final").mkdir(parents=True)
        return 0

    def train_retriever_main(arguments):
        made.append(("train_retriever", arguments))
        (Path(_value(arguments, "MODEL_DIR")) / "final").mkdir(parents=True)
        return 0

    def evaluate_main(arguments):
        made.append(("evaluate", arguments))
        asked = [r for _, r in read_jsonl(_value(arguments, "EVAL_FILE"))]
        closed = _value(arguments, "EvalConfig.passages") == "none"
        if _value(arguments, "EvalConfig.generate") == "False":
            rows = [{k: v for k, v in r.items() if k != "prediction"} for r in answered()]
        elif "/swap/" not in _value(arguments, "EVAL_FILE"):
            rows = answered(not closed)
        else:  # passages were changed
            rows = [{**r, "prediction": r["answers"][0], "passages": []} for r in asked]
        write_jsonl(_value(arguments, "PREDICTIONS"), rows)
        return 0

    def build_index_main(arguments):
        made.append(("build_index", arguments))
        Path(_value(arguments, "INDEX")).mkdir(parents=True)
        return 0

    def mini_main(arguments):
        made.append(("mini", arguments))
        return 0

    monkeypatch.setattr(run, "build_index_main", build_index_main)
    monkeypatch.setattr(mini, "main", mini_main)
    monkeypatch.setattr(run, "train_main", fake_train)
    monkeypatch.setattr(train_retriever, "main", train_retriever_main)
    monkeypatch.setattr(evaluate, "main", evaluate_main)
    monkeypatch.setattr(index_command, "main", lambda a: made.append(("index", a)) or 0)
    return made


def _results(out):
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return results, {row["name"]: row["scores"] for row in results["rows"]}


def _one(calls, name):
    return [arguments for called, arguments in calls if called == name]


def test_every_stage_runs_and_the_results_are_what_was_measured(
    small_factbook, calls, tmp_path, capsys
):
    out = tmp_path / "out"
    assert run.main(["--out", str(out), "--checkpoint", "nano/x", "--gin.TRAIN_STEPS=3"]) == 0
    assert [name for name, _ in calls] == [
        "build_index", "evaluate", "train", "train_retriever", "build_index",
        "train", "train", "train", "train", *4 * ["evaluate"], "index", "evaluate", "index",
    ]  # fmt: skip
    swapped, restored = ([one for _, one in read_jsonl(a[1])] for a in _one(calls, "index"))
    assert [one["id"] for one in swapped] == [one["id"] for one in restored]
    assert restored != swapped and all(one in PASSAGES for one in restored)
    [find], [read, *trained] = _one(calls, "train_retriever"), _one(calls, "train")
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
    indices = [_value(a, "INDEX") for a in _one(calls, "build_index")]
    assert [_value(a, "INDEX") for a in trained] == [indices[0], *indices, indices[1]]
    for name in ("TRAIN_FILE", "STORE", "TrainConfig.seed"):
        assert len({_value(a, name) for a in trained}) == 1, name
    assert [_value(a, "K") for a in _one(calls, "evaluate")] == [None, None, "1", "1", "1", "1"]
    results, rows = _results(out)
    assert rows["closed book"] == {"exact_match k=0": 100.0, "f1 k=0": 100.0}
    assert rows["jointly trained"]["recall@1"] == 100.0
    assert set(rows["BM25"]) == set(rows["untrained retriever"])
    assert results["swaps"][0]["follows"] and (out / "demo.png").is_file()
    stages = {run.PREPARE, run.INDEX, run.BEFORE, commands.READ, commands.FIND, run.ASK, run.SWAP}
    assert set(results["seconds"]) == {*stages, *NANO.modes, "all"}
    printed = capsys.readouterr().out
    for part in ("11/11", "$ atlas-jax train", "index swap", "jointly trained", "make explore"):
        assert part in printed


def test_the_mini_pair_is_put_together_and_asked_with_several_passages(
    small_factbook, calls, tmp_path, monkeypatch
):
    monkeypatch.setattr(recipes.importlib.util, "find_spec", lambda name: name)
    out = tmp_path / "out"
    assert run.main(["--out", str(out)]) == 0
    assert [name for name, _ in calls] == [
        "mini", "build_index", "evaluate", *4 * ["train"], *9 * ["evaluate"], "index",
        "evaluate", "index",
    ]  # fmt: skip
    assert not _one(calls, "train_retriever")
    lesson, closed, *retrieving = _one(calls, "train")
    assert _value(closed, "TRAIN_FILE") == _value(lesson, "QUESTION_FILE")
    for arguments in retrieving:  # the same questions of every title, but nothing is given
        assert arguments[0] == "--gin_file=runs/mini_titles_found.gin"
        for name in ("TRAIN_FILE", "QUESTION_FILE"):
            assert _value(arguments, name) == _value(lesson, name)
    asked = _one(calls, "evaluate")[1:-1]
    assert [_value(a, "K") for a in asked] == [None, *2 * ["1", "4", "8", "16"]]
    _, rows = _results(out)
    assert {f"exact_match k={k}" for k in (1, 4, 8, 16)} < set(rows["jointly trained"])


def test_without_minilm_the_nano_pair_is_taken_and_mini_is_refused(monkeypatch):
    monkeypatch.setattr(recipes.importlib.util, "find_spec", lambda name: None)
    assert recipes.shipped("") is NANO
    with pytest.raises(UserError, match="requirements-mini.txt"):
        recipes.shipped("mini")


def test_a_corpus_of_ones_own_is_parted_and_has_no_lesson(calls, tmp_path, monkeypatch):
    """Every third question is left to ask; a passage with the answer counts as gold."""
    passages, questions = tmp_path / "passages.jsonl", tmp_path / "questions.jsonl"
    write_jsonl(passages, ({"id": p["id"], "text": p["text"]} for p in PASSAGES))
    rows = [{"question": q["question"], "answers": q["answers"]} for q in QUESTIONS]
    write_jsonl(questions, rows)
    asked = own_files(passages, questions)(tmp_path / "data", 0, 0)
    few, rest = ([row for _, row in read_jsonl(p)] for p in (asked.few, asked.asked))
    assert (len(few), len(rest)) == (2, 2)
    names = [row["question"] for row in (*few, *rest)]
    assert sorted(names) == sorted(row["question"] for row in rows)
    assert all(row["gold"] == [f"p{[*COUNTRIES].index(_country(row))}"] for row in rest)
    parted = (own_files(passages, questions)(tmp_path / "data", n, 0) for n in range(5))
    drawn = {tuple(row["question"] for _, row in read_jsonl(one.few)) for one in parted}
    assert len(drawn) > 1
    monkeypatch.setattr(recipes.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(run, "choose", lambda *a: [])
    monkeypatch.setattr(run, "scores", lambda *a: {"exact_match k=1": 1.0, "recall@1": 1.0} | {
        f"exact_match k={k}": 1.0 for k in (4, 8, 16)})  # fmt: skip
    given = [f"--passages={passages}", f"--questions={questions}"]
    assert run.main(["--out", str(tmp_path / "out"), *given]) == 0
    assert len(_one(calls, "train")) == 3  # no lesson


def _country(row):
    return row["answers"][0].removesuffix(" City")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--passages=p.jsonl"], "--passages and --questions go together"),
        (["--questions=q.jsonl"], "--passages and --questions go together"),
        (["--passages=p", "--questions=q", "--corpus=squad"], "leave out --corpus"),
        (["--corpus=squad"], "by --data"),
        (["--corpus=squad", "--data=nowhere"], "passages.jsonl or passages.jsonl.gz is missing"),
        (["--data=somewhere"], "--data goes with --corpus=squad"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, said, tmp_path, capsys):
    out = tmp_path / "out"
    assert run.main(["--out", str(out), *options]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


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
    teach, few = commands.Commands.teach, ["TRAIN_STEPS=2", "WARMUP_STEPS=0", "BATCH_SIZE=8"]
    monkeypatch.setattr(
        commands.Commands, "teach", lambda *which: [*teach(*which), *(f"--gin.{o}" for o in few)]
    )
    checkpoint = tiny_checkpoint(
        tmp_path / "model", reader_tokenizer_file, retriever_tokenizer_file
    )
    out = tmp_path / "out"
    code = run.main([
        "--out", str(out), "--checkpoint", str(checkpoint), "--gin.TRAIN_STEPS=2",
        "--gin.WARMUP_STEPS=0", "--gin.K=2",
    ])  # fmt: skip
    assert code == 0
    rows = {r["name"]: r["scores"] for r in json.loads((out / "results.json").read_text())["rows"]}
    # This retriever is never trained: its recall before and after is one and the same.
    fixed = {k: v for k, v in rows["fixed retriever"].items() if k.startswith("recall")}
    assert fixed == rows["untrained retriever"]
    assert set(rows["closed book"]) == {"exact_match k=0", "f1 k=0"}
