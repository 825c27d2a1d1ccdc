"""Tasks `base` and `qa`: reading files, making text, scoring predictions."""

import gin
import numpy as np
import pytest

from atlas_jax import from_gin
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.tasks.base import BaseTask, Example, Prediction
from atlas_jax.tasks.qa import QATask

QUESTION = {"id": "q1", "question": "What is the capital of Chad?", "answers": ["N'Djamena"]}


def _file(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, rows)
    return path


def test_a_task_is_found_by_name():
    assert [from_gin.task(name).name for name in ("base", "qa", "mlm")] == ["base", "qa", "mlm"]
    with pytest.raises(UserError, match="no task is called 'qaa'; did you mean qa"):
        from_gin.task("qaa")


def test_gin_fills_a_task():
    gin.parse_config("QATask.query_format = 'Q: {question}'")
    assert from_gin.task("qa").query_format == "Q: {question}"


def test_a_question_becomes_text(tmp_path):
    passages = [
        {"title": "Chad", "text": "Its capital is N'Djamena."},
        {"id": 7, "text": "x"},
        {"id": None, "text": "y"},
    ]
    row = {**QUESTION, "gold": ["cd-1", 2], "passages": passages, "relation": "capital"}
    [record] = QATask().load(_file(tmp_path, row))
    example = QATask().example(record)
    assert example == Example(
        id="q1",
        query_text="question: What is the capital of Chad? answer: <extra_id_0>",
        retriever_text="What is the capital of Chad?",
        target_text="<extra_id_0> N'Djamena",
        answers=("N'Djamena",),
        gold_ids=("cd-1", "2"),
        given_passages=(
            {"id": "", "title": "Chad", "section": "", "text": "Its capital is N'Djamena."},
            {"id": "7", "title": "", "section": "", "text": "x"},
            {"id": "", "title": "", "section": "", "text": "y"},
        ),
        meta={"question": "What is the capital of Chad?", "relation": "capital"},
    )


def test_the_target_is_an_answer(tmp_path):
    several = {"question": "who?", "answers": ["one", "two", "three"]}
    path = _file(tmp_path, several, {**several, "target": "two"}, {"question": "x", "target": "y"})
    task = QATask()
    plain, chosen, target_only = task.load(path)
    assert task.example(plain).target_text == "<extra_id_0> one"
    drawn = {task.example(plain, np.random.default_rng(i)).target_text[13:] for i in range(30)}
    assert drawn == {"one", "two", "three"}
    first = QATask(answer_choice="first")
    assert first.example(plain, np.random.default_rng(4)).target_text == "<extra_id_0> one"
    assert task.example(chosen, np.random.default_rng(4)).target_text == "<extra_id_0> two"
    assert task.example(target_only).answers == ("y",)


def test_the_line_stands_in_for_an_id(tmp_path):
    path = _file(tmp_path, {"question": "a", "target": "b"}, {"question": "c", "target": "d"})
    assert [record.id for record in QATask().load(path)] == ["1", "2"]


def test_questions_without_answers_can_be_retrieved_for(tmp_path):
    path = _file(tmp_path, {"question": "who?"})
    with pytest.raises(UserError, match=":1: fields 'answers' and 'target' give no answer"):
        QATask().load(path)
    [record] = QATask().load(path, need_targets=False)
    example = QATask().example(record, np.random.default_rng(0))
    assert (example.target_text, example.answers) == ("", ())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": ["x"]}, "field 'question' is missing"),
        ({**QUESTION, "question": 3}, "field 'question' must be a string"),
        ({**QUESTION, "question": " \n"}, "field 'question' is empty"),
        ({**QUESTION, "answers": "x"}, "field 'answers' must be a list"),
        ({**QUESTION, "answers": ["x", 3]}, "must hold texts that are not empty, but has 3"),
        ({**QUESTION, "answers": ["x", ""]}, "must hold texts that are not empty, but has ''"),
        ({**QUESTION, "answers": []}, "give no answer"),
        ({**QUESTION, "gold": "p1"}, "field 'gold' must be a list"),
        ({**QUESTION, "passages": ["x"]}, "passages[0] must be an object"),
        ({**QUESTION, "passages": [{"text": "x"}, {}]}, "passages[1]: field 'text' is missing"),
        ({**QUESTION, "id": "q0"}, "id 'q0' is taken by line 1"),
    ],
)
def test_a_bad_question_is_named(tmp_path, row, message):
    path = _file(tmp_path, {**QUESTION, "id": "q0"}, row)
    with pytest.raises(UserError) as caught:
        QATask().load(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.jsonl: there is no record in it"):
        QATask().load(_file(tmp_path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QATask(query_format="{query}"), r"QATask.query_format.*no field \{query\}"),
        (lambda: QATask(target_format="{answer"), r"QATask.target_format.*fields are \{answer\}"),
        (lambda: QATask(answer_choice="last"), r"QATask.answer_choice = 'last'"),
        (lambda: BaseTask(query_format="{}"), r"BaseTask.query_format.*no field \{\}"),
    ],
)
def test_a_bad_setting_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_base_writes_what_the_file_says(tmp_path):
    path = _file(tmp_path, {"query": "2 + 2 =", "target": "4", "level": 1})
    task = BaseTask(query_format="{query} <extra_id_0>", target_format="<extra_id_0> {target}")
    [record] = task.load(path)
    example = task.example(record)
    assert example.query_text == "2 + 2 = <extra_id_0>"
    assert example.retriever_text == "2 + 2 ="
    assert (example.target_text, example.answers) == ("<extra_id_0> 4", ("4",))
    assert example.meta == {"level": 1}
    with pytest.raises(UserError, match=":1: field 'target' is missing"):
        task.load(_file(tmp_path, {"query": "x"}))
    with pytest.raises(UserError, match=":1: field 'query' is empty"):
        task.load(_file(tmp_path, {"query": "", "target": "x"}))


def test_predictions_are_scored_over_the_rows_that_can_be():
    def example(answers=(), gold=()):
        return Example("i", "q", "q", answers=answers, gold_ids=gold)

    passages = [
        {"id": "p1", "title": "Chad", "text": "A country."},
        {"id": "p2", "title": "Nile", "text": "The longest river"},
    ]
    predictions = [
        Prediction(example(("Nile", "the river Nile"), ("p2",)), "The Nile", passages),
        Prediction(example(("Amazon",)), "river Amazon", passages),
        Prediction(example((), ("p9",)), "anything", passages),
        Prediction(example(("Chad",)), None, passages),
    ]
    scores = QATask().evaluate(predictions, recall_at=(1, 2))
    assert scores == pytest.approx(
        {
            "exact_match": 1 / 2,
            "f1": (1 + 2 / 3) / 2,
            "recall@1": 0.0,
            "recall@2": 1 / 2,
            "answer_recall@1": 1 / 3,
            "answer_recall@2": 2 / 3,
        }
    )
    assert QATask().evaluate([Prediction(example(("x",)), "x")]) == {"exact_match": 1, "f1": 1}
    assert QATask().evaluate([]) == {}
