"""Task `temporal`: which edition's answers were given."""

import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.tasks.base import Prediction
from atlas_jax.tasks.temporal import TemporalTask

ROWS = [
    {"question": "Who leads Arvo?", "answers_2015": ["Ann"], "answers_2026": ["Bob", "B."],
     "gold_2015": ["old"], "gold_2026": ["new"], "changed": True},
    {"question": "Who leads Bera?", "answers_2015": ["Cyd"], "answers_2026": ["Dan"],
     "changed": True},
    {"question": "Who leads Coro?", "answers_2015": ["Eva"], "answers_2026": ["Fay"],
     "changed": True},
    {"question": "The capital of Arvo?", "answers_2015": ["Lindel"], "answers_2026": ["lindel"],
     "changed": False},
]  # fmt: skip


def examples(tmp_path, task, rows=ROWS):
    path = tmp_path / "temporal.jsonl"
    write_jsonl(path, rows)
    return [task.example(record) for record in task.load(path)]


def test_the_editions_answer_is_learnt(tmp_path):
    old, new = TemporalTask("2015", "2026"), TemporalTask("2026", "2015")
    assert examples(tmp_path, old)[0].target_text == "<extra_id_0> Ann"
    example = examples(tmp_path, new)[0]
    assert (example.answers, example.gold_ids) == (("Bob", "B."), ("new",))


def test_the_decoder_can_be_given_a_prompt(tmp_path):
    prompted = TemporalTask("2026", "2015", prompt_format="{question} It is")
    assert examples(tmp_path, prompted)[0].prompt_text == "Who leads Arvo? It is"
    assert examples(tmp_path, TemporalTask("2026", "2015"))[0].prompt_text == ""
    with pytest.raises(UserError, match="TemporalTask.prompt_format = '{edition}'"):
        TemporalTask("2026", "2015", prompt_format="{edition}")


def test_changed_and_unchanged_facts_are_told_apart(tmp_path):
    task = TemporalTask("2026", "2015")
    given = ["b", "Cyd", "nobody", "Lindel"]
    predictions = [
        Prediction(example, answer)
        for example, answer in zip(examples(tmp_path, task), given, strict=True)
    ]
    assert task.evaluate(predictions) == {
        "exact_match": 0.5,
        "changed_followed": pytest.approx(1 / 3),
        "changed_stayed": pytest.approx(1 / 3),
        "unchanged_right": 1.0,
    }
    followed = [task.row_fields(one)["followed"] for one in predictions]
    assert followed == ["2026", "2015", "neither", "both"]


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(UserError, match="TemporalTask.edition is not given"):
        TemporalTask()
    with pytest.raises(UserError, match="TemporalTask.other = '2015' is TemporalTask.edition, too"):
        TemporalTask("2015", "2015")
    with pytest.raises(UserError, match=r"temporal\.jsonl:1: field 'answers_2020' is missing"):
        examples(tmp_path, TemporalTask("2020", "2015"))
    rows = [{**ROWS[0], "answers_2015": [""]}]
    with pytest.raises(UserError, match=r":1: field 'answers' must hold texts"):
        examples(tmp_path, TemporalTask("2026", "2015"), rows)
