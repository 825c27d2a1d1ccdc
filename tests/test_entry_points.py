"""The commands one after the other, as a user runs them, each reading what the last one wrote."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atlas_jax import ask, evaluate, retrieve, train_retriever
from atlas_jax.build_index import main as build_index_main
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.train import main as train_main
from tests.training.runs import read_lines, write_run

Main = Callable[[list[str]], int]


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
) -> Path:
    """A folder with a corpus, questions, run.gin, a pretrained retriever and a trained model."""
    folder = tmp_path_factory.mktemp("work")
    write_run(folder, reader_tokenizer_file, retriever_tokenizer_file)
    pretrain = (
        f"RetrieverTrainConfig.model_dir='{folder}/retriever'",
        "RetrieverTrainConfig.total_steps=1",
        "RetrieverTrainConfig.batch_size=8",
        "ContrastiveConfig.queue_size=16",
    )
    assert run(train_retriever.main, folder, *pretrain) == 0
    model = (
        f"ModelConfig.retriever='{folder}/retriever/final'",
        "ModelConfig.retriever_tokenizer=''",
        f"TrainConfig.model_dir='{folder}/run'",
        "TrainConfig.total_steps=1",
        "EvalConfig.file=''",
    )
    assert run(train_main, folder, *model) == 0
    return folder


def run(main: Main, folder: Path, *bindings: str, arguments: tuple[str, ...] = ()) -> int:
    flags = [f"--gin_file={folder / 'run.gin'}", *(f"--gin.{binding}" for binding in bindings)]
    return main([*arguments, *flags])


def trained(folder: Path) -> tuple[str, ...]:
    return (
        f"ModelConfig.reader='{folder}/run/final'",
        f"ModelConfig.retriever='{folder}/run/final'",
        "ModelConfig.reader_tokenizer=''",
        "ModelConfig.retriever_tokenizer=''",
    )


@pytest.mark.slow
def test_index_retrieve_evaluate(
    work: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    index = (*trained(work), f"CorpusConfig.index='{work}/index'")
    assert run(build_index_main, work, *index) == 0
    assert capsys.readouterr().out == f"{work}/index: 16 passages\n"
    assert run(build_index_main, work, *index) == 0
    assert "already there" in capsys.readouterr().out

    asked = (f"RetrieveConfig.file='{work}/test.jsonl'", "RetrieveConfig.k=5")
    output = f"RetrieveConfig.output='{work}/found.jsonl'"
    assert run(retrieve.main, work, *index, *asked, output) == 0
    retrieved = json.loads(capsys.readouterr().out)
    found = read_lines(work / "found.jsonl")
    assert [row["id"] for row in found] == ["q5", "q6", "q7"]
    assert all(len(row["passages"]) == 5 and "prediction" not in row for row in found)

    predictions = f"EvalConfig.predictions='{work}/predictions.jsonl'"
    assert run(evaluate.main, work, *index, predictions) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["rows"] == 3
    assert {"exact_match", "f1", "recall@1", "recall@5", "answer_recall@5"} <= set(scores)
    assert scores["recall@5"] == retrieved["recall@5"]
    # The same passages, found by the reader's evaluation and by retrieval alone.
    for row, other in zip(read_lines(work / "predictions.jsonl"), found, strict=True):
        assert isinstance(row["prediction"], str)
        assert [p["id"] for p in row["passages"]] == [p["id"] for p in other["passages"]]

    wide = ("EvalConfig.generate=False", "EvalConfig.recall_at=(5, 20)")  # the corpus has 16
    assert run(evaluate.main, work, *index, *wide) == 0
    only = json.loads(capsys.readouterr().out)
    assert only["recall@5"] == scores["recall@5"]
    assert "exact_match" not in only and "recall@20" not in only
    assert [line for line in caplog.messages if "so recall@20 is left out" in line]


@pytest.mark.slow
def test_an_int8_index_with_reranking_finds_what_a_float32_one_does(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = (*trained(work), f"CorpusConfig.index='{work}/small'")
    asked = (f"RetrieveConfig.file='{work}/test.jsonl'", "RetrieveConfig.k=5")
    found, scores = {}, {}
    for dtype, reranked in (("float32", 0), ("int8", 16)):
        built = (*index, f"CorpusConfig.dtype={dtype}")
        assert run(build_index_main, work, *built) == 0
        # The other type is not "already there".
        assert capsys.readouterr().out == f"{work}/small: 16 passages\n"
        output = f"RetrieveConfig.output='{work}/{dtype}.jsonl'"
        rerank = f"RetrieveConfig.rerank={reranked}"
        assert run(retrieve.main, work, *index, *asked, output, rerank) == 0
        retrieved = json.loads(capsys.readouterr().out)
        rows = read_lines(work / f"{dtype}.jsonl")
        found[dtype] = [[p["id"] for p in row["passages"]] for row in rows]
        scores[dtype] = [p["score"] for row in rows for p in row["passages"]]
    assert found["int8"] == found["float32"]
    assert scores["int8"] == pytest.approx(scores["float32"], rel=1e-4)
    only = ("EvalConfig.generate=False", "StepConfig.rerank=16")
    assert run(evaluate.main, work, *index, *only) == 0
    assert json.loads(capsys.readouterr().out)["recall@5"] == retrieved["recall@5"]
    host = "CorpusConfig.searcher=scann"
    assert run(evaluate.main, work, *index, *only, host) == 2
    assert f"CorpusConfig.index = '{work}/small' is in int8" in capsys.readouterr().err


@pytest.mark.slow
def test_an_index_of_another_encoder_is_refused(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = f"CorpusConfig.index='{work}/other'"
    assert run(build_index_main, work, other) == 0  # by a retriever with random parameters
    assert run(evaluate.main, work, *trained(work), other) == 2
    assert "was made by another passage encoder" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_ask_shows_answer_passages_and_scores(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    question = ("What is the capital of Gond?",)
    assert run(ask.main, work, *trained(work), arguments=question) == 0
    output = capsys.readouterr().out
    assert output.startswith("answer: ")
    assert "log-probability" in output
    assert output.count("[p") + output.count("[r") == 3
    assert "The capital of" in output
    assert "attention" not in output

    assert run(ask.main, work, *trained(work), arguments=("--explain", *question)) == 0
    explained = capsys.readouterr().out
    assert explained.splitlines()[0] == output.splitlines()[0]
    assert all(column in explained for column in ("attention", "alone", "left out"))
    numbers = (r"\d", r"-?\d+\.\d{3}", r"\d+\.\d{3}", r"-?\d+\.\d\d", r"[+-]\d+\.\d\d")
    rows = re.findall("│ *" + " │ *".join(numbers) + " │", explained)
    assert len(rows) == 3  # one for each passage read

    lines = iter(["", "  ", "What is the capital of Gond?"])

    def typed(self: object, prompt: str = "", **_: object) -> str:
        del self, prompt
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("rich.console.Console.input", typed)
    assert run(ask.main, work, *trained(work)) == 0
    again = capsys.readouterr().out
    assert again.count("the question is empty; type what you want to know") == 2
    assert output in again


# Which configurables are unknown until more is imported than this entry point does.
UNKNOWN = """
import importlib, pkgutil, sys
import gin.config
import atlas_jax

def names():
    return {selector for selector, _ in gin.config._REGISTRY.items()}

importlib.import_module("atlas_jax." + sys.argv[1])
known = names()
for module in pkgutil.walk_packages(atlas_jax.__path__, "atlas_jax."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name != "apache_beam":  # an extra that does not fit beside the others
                raise
print(sorted(names() - known))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "train",
        "evaluate",
        "build_index",
        "retrieve",
        "ask",
        "train_retriever",
        "train_classifier",
        "self_train",
        "pet",
        "convert",
        "import_index",
        "remove_leaks",
    ],  # fmt: skip
)
def test_every_command_takes_the_config_of_any_run(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNKNOWN, name], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_an_empty_question_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ask.main([" "]) == 2
    error = capsys.readouterr().err
    assert error == "atlas-jax ask: error: the question is empty; type what you want to know\n"


def test_stored_token_ids_that_a_model_lacks_are_refused(
    tmp_path: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    reader, retriever = map(Tokenizer.from_file, (reader_tokenizer_file, retriever_tokenizer_file))
    store, passages = tmp_path / "store", tmp_path / "passages.jsonl"
    lengths = StoreConfig(reader_length=48, retriever_length=48)
    PassageStore.build(passages, store, reader, retriever, lengths, progress=False)
    manifest = json.loads((store / "manifest.json").read_text())
    commands: dict[Main, tuple[str, ...]] = {
        train_main: (f"TrainConfig.model_dir='{tmp_path}/run'", "TrainConfig.total_steps=1"),
        evaluate.main: (),
        retrieve.main: (
            f"RetrieveConfig.file='{tmp_path}/test.jsonl'",
            f"RetrieveConfig.output='{tmp_path}/found.jsonl'",
        ),
        build_index_main: (f"CorpusConfig.index='{tmp_path}/index'",),
        train_retriever.main: (
            f"RetrieverTrainConfig.model_dir='{tmp_path}/retriever'",
            "RetrieverTrainConfig.total_steps=1",
        ),
    }
    for tower, greatest in (("reader", 368), ("retriever", 144)):  # one more than they have
        damaged = {**manifest, tower: {**manifest[tower], "max_id": greatest}}
        (store / "manifest.json").write_text(json.dumps(damaged))
        for main, bindings in commands.items():
            if tower == "reader" and main not in (train_main, evaluate.main):
                continue  # no reader is loaded there
            assert run(main, tmp_path, *bindings) == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert f"error: {store} holds {tower} token id {greatest}, but the {tower}" in error
            assert f"vocabulary has {greatest} ids" in error
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["store"]


def test_what_an_entry_point_needs_is_named(
    tmp_path: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)

    def error(main: Main, *bindings: str) -> str:
        assert run(main, tmp_path, *bindings) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "CorpusConfig.index is not given" in error(build_index_main)
    assert "no value for RetrieveConfig.file" in error(retrieve.main)
    assert "no value for RetrieverTrainConfig.model_dir" in error(train_retriever.main)
    assert "no value for TrainConfig.model_dir" in error(train_main)
    assert "EvalConfig.task = 'mlm' is not for typed" in error(ask.main, "EvalConfig.task=mlm")
    assert "a typed question brings no passages" in error(ask.main, "EvalConfig.passages=file")
