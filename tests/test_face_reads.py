"""The Python face reads as the model folder says, unless it is told otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest

import atlas_jax
from atlas_jax import face, from_gin
from atlas_jax.answering.batcher import DataConfig
from atlas_jax.answering.config import EvalConfig
from atlas_jax.core.config import load_gin
from atlas_jax.corpus.config import CorpusConfig, CorpusSpec, ReadConfig
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.assembly import load_tokenizers
from atlas_jax.models.config import ModelSpec
from atlas_jax.tasks.cloze import ClozeTask
from atlas_jax.tasks.qa import QATask
from atlas_jax.training.config import StepConfig, TrainConfig
from tests.test_expected import NANO, NANO_FORMATS, taught

__all__ = ["taught"]  # a fixture
NANO_STORE = StoreConfig(retriever_format=NANO_FORMATS, reader_length=256, retriever_length=64)
TRAIN = TrainConfig(model_dir="run", file="train.jsonl", total_steps=1)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `load` would answer by, without loading it."""
    monkeypatch.setattr(face, "Atlas", lambda run: run)
    return lambda *args, **settings: atlas_jax.load(*args, **settings)


def test_load_reads_as_the_command_does(told: Any, taught: Path) -> None:
    for folder in (NANO, taught):
        load_gin(["runs/ask.gin"], ["STORE=store", f"INITIAL_CHECKPOINT_PATH={folder}"])
        run, wanted = told(folder, store="store"), from_gin.answer_run()
        assert run.corpus.formats == wanted.corpus.formats == NANO_STORE
        assert (run.task, run.data) == (wanted.task, wanted.data)
        assert run.generation.max_length == wanted.generation.max_length
        assert run.read.reader_length == wanted.read.reader_length
    assert (run.data.query_length, run.read.reader_length) == (33, 99)
    assert run.task.query_format == "q: {question}"


def test_what_load_is_told_wins_field_by_field(told: Any, taught: Path) -> None:
    run = told(
        taught, store="store", read={"k": 8}, formats={"reader_length": 160}, task=QATask(),
        data=DataConfig(),
    )  # fmt: skip
    assert run.read == ReadConfig(k=8, reader_length=99)
    assert run.corpus.formats.reader_length == 160
    assert run.corpus.formats.retriever_format == NANO_FORMATS
    assert (run.task, run.data) == (QATask(), DataConfig())


def test_a_task_of_the_folder_is_asked_in_its_wording(told: Any) -> None:
    assert told(NANO, store="store", task="cloze").data.query_length == 40
    assert told(NANO, store="store", task=ClozeTask()).data.query_length == 40
    assert told(NANO, store="store").data.query_length == 64


def test_build_index_takes_the_formats_of_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    monkeypatch.setattr(face.inference, "build_index", lambda run: (runs.append(run), (3, True))[1])
    assert atlas_jax.build_index(NANO, passages="p", store="s", index="i") == 3
    atlas_jax.build_index(NANO, store="s", index="i", formats={"retriever_length": 100})
    assert [run.corpus.formats.retriever_length for run in runs] == [64, 100]
    assert runs[0].corpus.formats == NANO_STORE


def test_a_run_of_a_folder_is_that_of_the_command(taught: Path) -> None:
    load_gin(
        ["runs/finetune_qa.gin"],
        ["MODEL_DIR=run", "TRAIN_FILE=train.jsonl", "STORE=store", "TRAIN_STEPS=1", "K=5",
         f"INITIAL_CHECKPOINT_PATH={taught}", "RETRIEVER_TRAINING='fixed'"],
    )  # fmt: skip
    wanted = from_gin.train_run()
    run = atlas_jax.TrainRun.from_folder(
        taught, TRAIN, CorpusConfig(store="store"), step={"k": 5}, data={"batch_size": 4}
    )
    assert run.step.reader_length == wanted.step.reader_length == 99 and run.step.k == 5
    assert run.corpus.formats == wanted.corpus.formats
    assert (run.task, run.eval_task) == (wanted.task, wanted.task)
    assert (run.data.query_length, run.data.batch_size) == (33, 4)
    assert run.generation.max_length == 7
    own = QATask(answer_choice="first")
    again = atlas_jax.TrainRun.from_folder(taught, TRAIN, task=own)
    assert (again.task, again.eval_task) == (own, own)


def test_a_length_that_cannot_be_read_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    passages = tmp_path / "passages.jsonl"
    passages.write_text('{"id": "1", "text": "Aspirin is used against pain."}\n')
    store, index = tmp_path / "store", tmp_path / "index"
    places = {"passages": passages, "store": store}
    message = (
        r"StoreConfig.retriever_length = 129, but the retriever can read 128 .* to 128 or less"
    )
    formats = {"retriever_length": 129}
    with pytest.raises(atlas_jax.UserError, match=message):
        atlas_jax.load(NANO, **places, formats=formats)
    with pytest.raises(atlas_jax.UserError, match=message):
        atlas_jax.build_index(NANO, **places, index=index, formats=formats)
    corpus = CorpusConfig(passages=str(passages), store=str(store))
    train = TrainConfig(str(tmp_path / "run"), str(passages), total_steps=1)
    with pytest.raises(atlas_jax.UserError, match=message):
        atlas_jax.TrainRun.from_folder(NANO, train, corpus, formats=formats)
    by_hand = atlas_jax.TrainRun(
        train=train, task=QATask(), eval_task=QATask(), models=ModelSpec.of_folder(NANO),
        corpus=CorpusSpec(corpus, StoreConfig(retriever_length=129)),
    )  # fmt: skip
    with pytest.raises(atlas_jax.UserError, match=message):
        atlas_jax.train(by_hand)
    with pytest.raises(atlas_jax.UserError, match=r"DataConfig.retriever_query_length = 129, but"):
        atlas_jax.load(NANO, **places, data={"retriever_query_length": 129})
    assert list(tmp_path.iterdir()) == [passages]


def test_a_store_that_the_retriever_cannot_read_is_refused(tmp_path: Path) -> None:
    file, store = tmp_path / "passages.jsonl", tmp_path / "store"
    file.write_text(json.dumps({"id": "1", "text": "Pain and fever. " * 60}) + "\n")
    tokenizers = load_tokenizers(ModelSpec.of_folder(NANO).config)
    PassageStore.build(
        file, store, tokenizers.reader, tokenizers.retriever, StoreConfig(retriever_length=192),
        progress=False,
    )  # fmt: skip
    with pytest.raises(atlas_jax.UserError, match="store holds passages of more than 128 retriev"):
        atlas_jax.build_index(NANO, store=store, index=tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_what_is_no_setting_is_named(told: Any) -> None:
    with pytest.raises(atlas_jax.UserError, match=r"^formats: StoreConfig has no field 'reader_le"
                       r"nght'; did you mean reader_length\?$"):  # fmt: skip
        told(NANO, store="store", formats={"reader_lenght": 3})
    with pytest.raises(atlas_jax.UserError, match="^read: expected a ReadConfig, or a dict .* a i"):
        told(NANO, store="store", read=8)
    with pytest.raises(atlas_jax.UserError, match="^StepConfig.k = 0"):
        told(NANO, store="store", read={"k": 0})


def test_a_closed_book_needs_no_retriever_lengths(told: Any) -> None:
    run = told(NANO, data={"retriever_query_length": 129})
    assert run.evaluation == EvalConfig(passages="none")
    assert atlas_jax.TrainRun.from_folder(
        NANO, TrainConfig("run", "train.jsonl", 1, passages="none"), step=StepConfig(k=1)
    ).step == StepConfig(k=1)
