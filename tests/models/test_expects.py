"""What a model folder says of how its models read, and what a person says instead."""

import dataclasses
import json

import pytest

from atlas_jax.answering.batcher import DataConfig
from atlas_jax.core.errors import UserError
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.expects import (
    Asking,
    Expects,
    combined,
    from_json,
    settled,
    to_json,
    wording_of,
)
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.tasks.qa import QATask
from atlas_jax.training.config import StepConfig

EXPECTS = Expects(
    reader_format="{title}. {text}",
    retriever_format=("{title}: {section}", "{text}"),
    reader_length=20,
    retriever_length=10,
    text_length=30,
    tasks={
        "qa": Asking(
            {"query_format": "{question}?", "retriever_format": "query: {question}"},
            query_length=8,
            retriever_query_length=7,
            target_length=5,
            prompt_length=0,
        )
    },
)


def test_json_gives_back_what_it_took():
    assert from_json(json.loads(json.dumps(to_json(EXPECTS))), "here") == EXPECTS
    assert to_json(Expects()) == {} and from_json({}, "here") == Expects()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "here: expected an object"),
        ({"reader_lenght": 3}, "here: unknown field 'reader_lenght'"),
        ({"reader_length": "3"}, "here: field 'reader_length' cannot be '3'"),
        ({"reader_length": True}, "here: field 'reader_length' cannot be True"),
        ({"reader_length": 0}, "here: field 'reader_length' cannot be 0"),
        ({"reader_format": "{titel}"}, "here: StoreConfig.reader_format = '{titel}'"),
        ({"reader_format": ["{text}", 3]}, "here: field 'reader_format' must hold texts"),
        ({"tasks": {"qa": {"length": 3}}}, "here: tasks: qa: unknown field 'length'"),
        ({"tasks": {"qa": {"wording": {"query_format": 3}}}}, "here: tasks: qa: field 'query_for"),
    ],
)
def test_a_damaged_folder_is_refused_by_field(value, message):
    with pytest.raises(UserError, match=message):
        from_json(value, "here")


def test_what_was_told_wins_then_the_folder_then_the_default():
    assert settled(StoreConfig, EXPECTS.store, {}) == StoreConfig(
        "{title}. {text}", ("{title}: {section}", "{text}"), 20, 10
    )
    told = settled(StoreConfig, EXPECTS.store, {"reader_length": 99})
    assert (told.reader_length, told.retriever_length) == (99, 10)
    assert settled(StoreConfig, Expects().store, {}) == StoreConfig()
    assert settled(StepConfig, EXPECTS.reading, {"k": 3}) == StepConfig(k=3, reader_length=30)
    data = settled(DataConfig, EXPECTS.lengths("qa"), {"batch_size": 2, "target_length": 6})
    assert data == DataConfig(2, query_length=8, retriever_query_length=7, target_length=6)
    assert settled(DataConfig, EXPECTS.lengths("fever"), {}) == DataConfig()
    assert settled(GenerationConfig, EXPECTS.generation("qa"), {}).max_length == 5
    assert settled(GenerationConfig, EXPECTS.generation("fever"), {}) == GenerationConfig()
    task = settled(QATask, EXPECTS.wording("qa"), {"query_format": "q: {question}"})
    assert (task.query_format, task.retriever_format) == ("q: {question}", "query: {question}")
    assert task.target_format == QATask().target_format


def test_only_a_length_that_was_told_is_refused_and_the_others_are_cut():
    cut = settled(StoreConfig, {"retriever_length": 192}, {"reader_length": 900}, most=128)
    assert (cut.reader_length, cut.retriever_length) == (900, 128)
    assert (
        settled(DataConfig, {"retriever_query_length": 200}, {}, 128).retriever_query_length == 128
    )
    fits = settled(StoreConfig, EXPECTS.store, {"retriever_length": 128}, most=128)
    assert fits.retriever_length == 128
    with pytest.raises(
        UserError,
        match=r"^StoreConfig.retriever_length = 192, but the retriever can read 128 tokens .*"
        r"bind StoreConfig.retriever_length to 128 or less",
    ):
        settled(StoreConfig, EXPECTS.store, {"retriever_length": 192}, most=128)
    with pytest.raises(UserError, match=r"^DataConfig.retriever_query_length = 129, but"):
        settled(DataConfig, {}, {"retriever_query_length": 129}, most=128)


def test_a_field_that_the_task_has_not_is_named():
    with pytest.raises(UserError, match="the model folder says old_format of QATask, which has no"):
        settled(QATask, {"old_format": "x"}, {})


def test_reader_and_retriever_may_come_from_two_folders():
    other = Expects(
        reader_format="{text}",
        retriever_format="{text}",
        reader_length=1,
        retriever_length=2,
        text_length=3,
        tasks={"qa": Asking({"query_format": "x", "retriever_format": "y"}, 4, 5, 6, 7)},
    )
    both = combined(other, EXPECTS)
    assert (both.reader_length, both.text_length, both.retriever_length) == (1, 3, 10)
    assert (both.reader_format, both.retriever_format) == ("{text}", EXPECTS.retriever_format)
    assert both.tasks["qa"] == Asking(
        {"query_format": "x", "retriever_format": "query: {question}"}, 4, 7, 6, 7
    )
    assert combined(EXPECTS.half("reader"), EXPECTS.half("retriever")) == EXPECTS
    assert combined(EXPECTS, EXPECTS) == EXPECTS
    assert EXPECTS.half("retriever").reader_format is None


def test_training_teaches_a_task_and_keeps_the_others():
    store = StoreConfig(reader_length=5)
    asking = Asking(wording_of(QATask()), query_length=9)
    taught = EXPECTS.taught(store, 40, {"fever": asking})
    assert taught.tasks == {"qa": EXPECTS.tasks["qa"], "fever": asking}
    assert taught.store == dataclasses.asdict(store) and taught.reading == {"reader_length": 40}
    assert EXPECTS.taught() == EXPECTS
    assert set(asking.wording) == {
        "query_format", "target_format", "retriever_format", "prompt_format"
    }  # fmt: skip
