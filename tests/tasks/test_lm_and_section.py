"""Tasks `lm` and `section`: passages written from their beginnings or headings."""

import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.tasks.base import Prediction
from atlas_jax.tasks.lm import LMTask
from atlas_jax.tasks.section import SectionTask

ROWS = [
    {"id": "a1", "title": "Arvo", "section": "Water", "text": "The river Sann lies in the north."},
    {"id": "a2", "title": "Arvo", "section": "Water", "text": "A lake  lies on the south side."},
    {"id": "a3", "title": "Arvo", "text": "The capital of Arvo is Lindel since then."},
    {"id": "a4", "title": "Arvo", "section": "People", "text": "Few live here."},
]


def load(tmp_path, task, rows=ROWS):
    path = tmp_path / "passages.jsonl"
    write_jsonl(path, rows)
    return task.load(path)


def test_a_text_is_cut_between_words(tmp_path):
    task = LMTask(min_words=5)
    records = load(tmp_path, task)
    assert [record.id for record in records] == ["a1", "a2", "a3"]
    example = task.example(records[1])
    assert example.query_text == "A lake  lies on<extra_id_0>"  # 7 words: round(3.5) is 4
    assert example.target_text == "<extra_id_0> the south side."
    assert example.answers == ("the south side.",)
    assert example.excluded_ids == ("a2",)


def test_where_it_is_cut_is_drawn_from_the_range(tmp_path):
    task = LMTask(min_words=5, min_prefix=0.01, max_prefix=0.99)
    record = load(tmp_path, task)[0]
    words = record.fields["text"].split()
    lengths = set()
    for seed in range(60):
        example = task.example(record, np.random.default_rng(seed))
        first = example.retriever_text.split()
        assert [*first, *example.answers[0].split()] == words
        lengths.add(len(first))
    assert lengths == set(range(1, len(words)))


def test_the_passage_itself_may_be_read_until_the_filter_begins(tmp_path):
    task = LMTask(min_words=5, filter_self_after=10)
    record = load(tmp_path, task)[0]
    rng = np.random.default_rng(0)
    assert task.example(record, rng, step=9).excluded_ids == ()
    assert task.example(record, rng, step=10).excluded_ids == ("a1",)
    assert task.example(record).excluded_ids == ("a1",)  # evaluation
    assert LMTask(filter_self=False).example(record).excluded_ids == ()


def test_a_heading_becomes_the_query(tmp_path):
    task = SectionTask(min_words=5)
    records = load(tmp_path, task)
    assert [record.id for record in records] == ["a1", "a2"]  # a3 has none, a4 is too short
    example = task.example(records[0])
    assert (example.query_text, example.retriever_text) == ("Arvo, Water", "Arvo, Water")
    assert example.target_text == ROWS[0]["text"]


@pytest.mark.parametrize(
    ("name", "expected"), [("none", ()), ("passage", ("a2",)), ("section", ("a1", "a2"))]
)
def test_what_may_not_be_retrieved(tmp_path, name, expected):
    task = SectionTask(min_words=5, filter=name)
    assert task.example(load(tmp_path, task)[1]).excluded_ids == expected


def test_rouge_is_scored(tmp_path):
    task = SectionTask(min_words=5)
    example = task.example(load(tmp_path, task)[0])
    scores = task.evaluate([Prediction(example, "the river Oder lies in the north")])
    assert scores["rouge1"] == pytest.approx(6 / 7)
    assert scores["rouge2"] == pytest.approx(4 / 6)
    assert scores["rougeL"] == pytest.approx(6 / 7)
    assert scores["exact_match"] == 0.0


@pytest.mark.parametrize("task", [LMTask(min_words=50), SectionTask(min_words=50)])
def test_too_short_passages_are_told(tmp_path, task):
    with pytest.raises(UserError, match=r"no passage has 50 words \((LM|Section)Task.min_words\)"):
        load(tmp_path, task)


def test_passages_without_section_are_told(tmp_path):
    rows = [{"id": "1", "title": "t", "text": "one two three"}]
    with pytest.raises(UserError, match="no passage has a field 'section' that is not empty"):
        load(tmp_path, SectionTask(min_words=2), rows)


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (LMTask, {"min_prefix": 0.0}, "LMTask.min_prefix = 0.0: expected a number between"),
        (LMTask, {"min_prefix": 0.6}, "LMTask.max_prefix = 0.5: expected from 0.6"),
        (SectionTask, {"filter": "page"}, "SectionTask.filter = 'page': expected one of"),
        (SectionTask, {"query_format": "{text}"}, r"no field \{text\}"),
    ],
)
def test_impossible_settings_are_refused(task, settings, message):
    with pytest.raises(UserError, match=message):
        task(**settings)
