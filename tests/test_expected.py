"""The commands read as the model folder says, unless they are told otherwise."""

import json
from pathlib import Path

import pytest

from atlas_jax import from_gin
from atlas_jax.answering import inference
from atlas_jax.answering.config import EvalConfig
from atlas_jax.core.config import load_gin
from atlas_jax.core.errors import UserError
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.folder import load_expects
from atlas_jax.training.config import OptimizerConfig, StepConfig, TrainConfig
from tests.nano import NANO

NANO_FORMATS = ("{title}: {section}", "{title}: {text}", "{text}")
BINDINGS = {
    "runs/finetune_qa.gin": ["MODEL_DIR=x", "TRAIN_FILE=x", "STORE=x", "TRAIN_STEPS=1"],
    "runs/ask.gin": ["STORE=x"],
    "runs/build_index.gin": ["PASSAGES=x", "STORE=x", "INDEX=x"],
    "runs/retrieve.gin": ["EVAL_FILE=x", "OUTPUT=x", "STORE=x"],
    "runs/evaluate.gin": ["EVAL_FILE=x", "STORE=x"],
}
RUNS = {
    "runs/finetune_qa.gin": from_gin.train_run,
    "runs/ask.gin": from_gin.answer_run,
    "runs/build_index.gin": from_gin.index_run,
    "runs/retrieve.gin": from_gin.retrieve_run,
    "runs/evaluate.gin": from_gin.answer_run,
}


def run_of(file: str, *told: str, folder: Path = NANO, files: tuple[str, ...] = ()):
    load_gin([file, *files], [*BINDINGS[file], f"INITIAL_CHECKPOINT_PATH={folder}", *told])
    return RUNS[file]()


@pytest.fixture
def old_nano(tmp_path):
    """The nano's config in format 1, which says nothing of how it reads."""
    config = json.loads((NANO / "config.json").read_text())
    del config["expects"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps({**config, "format": 1}))
    return tmp_path / "old"


@pytest.fixture
def taught(tmp_path):
    """A folder whose models were trained for questions in other words and lengths."""
    config = json.loads((NANO / "config.json").read_text())
    config["expects"]["text_length"] = 99
    config["expects"]["tasks"]["qa"] = {
        "wording": {"query_format": "q: {question}", "retriever_format": "search: {question}"},
        "query_length": 33,
        "retriever_query_length": 34,
        "target_length": 7,
    }
    (tmp_path / "taught").mkdir()
    (tmp_path / "taught" / "config.json").write_text(json.dumps(config))
    return tmp_path / "taught"


@pytest.mark.parametrize("file", RUNS)
def test_every_command_reads_passages_as_the_folder_says(file):
    formats = run_of(file).corpus.formats
    assert formats == StoreConfig(retriever_format=NANO_FORMATS, reader_length=256,
                                  retriever_length=64)  # fmt: skip


def test_the_corpus_file_of_the_factbook_says_what_the_nano_expects():
    formats = run_of("runs/build_index.gin").corpus.formats
    told = run_of("runs/build_index.gin", files=("corpora/factbook.gin",)).corpus.formats
    assert told == formats


@pytest.mark.parametrize("file", ["runs/finetune_qa.gin", "runs/ask.gin", "runs/retrieve.gin"])
def test_questions_are_asked_as_the_folder_says(file, taught):
    run = run_of(file, folder=taught)
    assert run.task.query_format == "q: {question}"
    assert run.task.retriever_format == "search: {question}"
    assert run.task.target_format == "<extra_id_0> {answer}"  # not said: the default
    lengths = (run.data.query_length, run.data.retriever_query_length, run.data.target_length)
    assert lengths == (33, 34, 7)
    if file != "runs/retrieve.gin":
        assert run.generation.max_length == 7
        assert getattr(run, "read", getattr(run, "step", None)).reader_length == 99


def test_what_is_told_wins(taught):
    run = run_of(
        "runs/ask.gin", "QUERY_LENGTH=50", "TEXT_LENGTH=120", "PASSAGE_LENGTH=70",
        "QATask.query_format='{question}'", "StoreConfig.retriever_format='{text}'",
        folder=taught,
    )  # fmt: skip
    assert (run.data.query_length, run.data.retriever_query_length) == (50, 50)
    assert (run.data.target_length, run.read.reader_length) == (7, 120)
    assert run.corpus.formats == StoreConfig(
        retriever_format="{text}", reader_length=70, retriever_length=64
    )
    assert run.task.query_format == "{question}"
    assert run.task.retriever_format == "search: {question}"


def test_a_folder_of_format_1_is_read_with_the_defaults_that_fit(old_nano):
    run = run_of("runs/finetune_qa.gin", folder=old_nano)
    assert run.corpus.formats == StoreConfig(retriever_length=128)  # not 192: there are 128
    assert (run.data.query_length, run.data.retriever_query_length) == (64, 64)
    assert (run.data.target_length, run.step.reader_length) == (16, 256)
    assert run.task == from_gin.task("qa")


@pytest.mark.parametrize("file", RUNS)
def test_a_length_that_cannot_be_is_refused_before_anything_is_built(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = r"^StoreConfig.retriever_length = 129, .* 128 tokens .* bind .* to 128 or less$"
    with pytest.raises(UserError, match=message):
        run_of(file, "StoreConfig.retriever_length=129")
    if "build" not in file:
        with pytest.raises(UserError, match=r"^DataConfig.retriever_query_length = 129, .*128"):
            run_of(file, "QUERY_LENGTH=129")
    assert list(tmp_path.iterdir()) == []
    formats = run_of(file, "StoreConfig.retriever_length=128").corpus.formats
    assert formats.retriever_length == 128  # as the message says


def test_a_closed_book_needs_no_positions():
    run_of("runs/ask.gin", "PASSAGE_SOURCE='none'", "QUERY_LENGTH=129")


def test_reader_and_retriever_of_two_folders_read_each_in_its_way(taught, old_nano):
    run = run_of("runs/ask.gin", f"ModelConfig.retriever='{old_nano}'", folder=taught)
    assert run.corpus.formats == StoreConfig(reader_length=256, retriever_length=128)
    assert (run.data.query_length, run.data.retriever_query_length) == (33, 64)
    assert (run.task.query_format, run.task.retriever_format) == ("q: {question}", "{question}")


def test_none_leaves_a_field_open_and_only_there():
    left_open = ["StepConfig.k=None", "EvalConfig.recall_at=None", "reader/OptimizerConfig.b2=None"]
    load_gin([], left_open)
    assert from_gin.told(StepConfig) == StepConfig()
    assert from_gin.told(EvalConfig) == EvalConfig()
    assert from_gin.told(OptimizerConfig, "reader") == OptimizerConfig()
    load_gin(["runs/finetune_qa.gin"], [*BINDINGS["runs/finetune_qa.gin"],
             "INITIAL_CHECKPOINT_PATH=x", "TrainConfig.total_steps=None"])  # fmt: skip
    with pytest.raises(UserError, match=r"no value for TrainConfig.total_steps; give --gin.Train"):
        from_gin.told(TrainConfig)


def test_the_nano_says_how_it_reads():
    expects = load_expects(NANO)
    assert (expects.retriever_format, expects.text_length) == (NANO_FORMATS, 256)
    assert list(expects.tasks) == ["cloze"]


FACTS = {
    "Arvo": {"Government": "Capital: name: Lindel. Government type: parliamentary republic.",
             "Geography": "Highest point: Mount Sann 2,310 m. Climate: mild, wet winters."},
    "Bera": {"Government": "Capital: name: Tomund. Government type: constitutional monarchy.",
             "Economy": "Currency: Beran crown. Industries: fishing, shipbuilding, glass."},
    "Coro": {"Government": "Capital: name: Essin. Government type: federal republic.",
             "Geography": "Highest point: Olt Peak 940 m. Climate: dry, hot summers."},
}  # fmt: skip


def test_the_nano_finds_the_same_with_and_without_the_file_of_its_corpus(tmp_path):
    passages = [
        {"id": f"{title}-{section}", "title": title, "section": section, "text": text}
        for title, sections in FACTS.items()
        for section, text in sections.items()
    ]
    queries = [{"question": f"What is the {asked} of {title}?", "answers": ["x"]}
               for title in FACTS for asked in ("capital", "climate", "currency")]  # fmt: skip
    for name, rows in (("passages", passages), ("queries", queries)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def found(name: str, *told: str, files: tuple[str, ...] = ()) -> list[list[tuple[str, float]]]:
        output = tmp_path / f"{name}.jsonl"
        load_gin(["runs/retrieve.gin", *files], [
            f"INITIAL_CHECKPOINT_PATH={NANO}", f"STORE={tmp_path / name}", "K=6", "BATCH_SIZE=16",
            f"PASSAGES={tmp_path / 'passages'}", f"EVAL_FILE={tmp_path / 'queries'}",
            f"OUTPUT={output}", "CorpusConfig.embed_batch_size=8", *told,
        ])  # fmt: skip
        inference.retrieve(from_gin.retrieve_run())
        rows = map(json.loads, output.read_text().splitlines())
        return [[(one["id"], one["score"]) for one in row["passages"]] for row in rows]

    alone = found("alone")
    assert alone == found("factbook", files=("corpora/factbook.gin",))
    assert alone != found("other", "StoreConfig.retriever_format='{title} {text}'")
