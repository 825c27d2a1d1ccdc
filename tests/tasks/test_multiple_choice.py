"""Task `multiple_choice`: prompts, orders, and scores with and without a letter bias."""

import math
import string

import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.tasks.base import Prediction
from atlas_jax.tasks.multiple_choice import MultipleChoiceTask

ROW = {
    "id": "m1",
    "question": "Find the order of 2 in Z_3.",
    "options": {"A": "0", "B": "2", "C": "1"},
    "answer": "B",
    "subject": "algebra",
}


def records(tmp_path, *rows, task=None, need_targets=True):
    path = tmp_path / "choice.jsonl"
    write_jsonl(path, rows)
    return (task or MultipleChoiceTask()).load(path, need_targets)


def test_a_question_becomes_the_prompt(tmp_path):
    task = MultipleChoiceTask()
    example = task.example(*records(tmp_path, ROW))
    assert example.query_text == (
        "question: Find the order of 2 in Z_3. options: (A) 0 (B) 2 (C) 1 answer: <extra_id_0>"
    )
    assert example.target_text == "<extra_id_0> B"
    assert example.answers == ("2",)
    assert [(c.answer, c.target_text[-1]) for c in example.choices] == [
        ("0", "A"), ("2", "B"), ("1", "C")
    ]  # fmt: skip
    (cut,) = example.shorten
    assert example.query_text[cut.start : cut.end] == ROW["question"]
    assert cut.max_tokens == 356
    assert example.retriever_text == "Find the order of 2 in Z_3. 0 2 1"


def test_blanks_around_a_question_are_no_part_of_it(tmp_path):
    (record,) = records(tmp_path, {**ROW, "question": f"  {ROW['question']}\n"})
    example = MultipleChoiceTask().example(record)
    plain = MultipleChoiceTask().example(*records(tmp_path, ROW))
    assert (example.query_text, example.shorten) == (plain.query_text, plain.shorten)


def test_each_order_can_find_passages_of_its_own(tmp_path):
    task = MultipleChoiceTask(retriever_format="", eval_orders="cyclic")
    asked = task.variants(*records(tmp_path, ROW, task=task))
    assert [example.retriever_text for example in asked] == [
        f"question: Find the order of 2 in Z_3. options: {options} answer: <extra_id_0>"
        for options in ("(A) 0 (B) 2 (C) 1", "(A) 2 (B) 1 (C) 0", "(A) 1 (B) 0 (C) 2")
    ]


def test_the_decoders_prompt_has_the_options_as_they_are_asked(tmp_path):
    task = MultipleChoiceTask(prompt_format="of {options}:", eval_orders="cyclic")
    asked = task.variants(*records(tmp_path, ROW, task=task))
    assert [example.prompt_text for example in asked[:2]] == [
        "of (A) 0 (B) 2 (C) 1:", "of (A) 2 (B) 1 (C) 0:"
    ]  # fmt: skip
    assert asked[0].target_text == "<extra_id_0> B"  # behind the prompt, not in it
    with pytest.raises(UserError, match="MultipleChoiceTask.prompt_format = '{letter}'"):
        MultipleChoiceTask(prompt_format="{letter}")


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        ("single", ["ABC"]),
        ("cyclic", ["ABC", "BCA", "CAB"]),
        ("all", ["ABC", "ACB", "BAC", "BCA", "CAB", "CBA"]),
    ],
)
def test_evaluation_asks_in_every_order(tmp_path, orders, expected):
    task = MultipleChoiceTask(eval_orders=orders)
    (record,) = records(tmp_path, ROW, task=task, need_targets=False)
    asked = task.variants(record)
    assert [example.meta["order"] for example in asked] == expected
    for example, order in zip(asked, expected, strict=True):
        letters = [ROW["options"][letter] for letter in order]
        assert [choice.answer for choice in example.choices] == letters
        assert example.target_text[-1] == "ABC"[order.index("B")]
        assert example.retriever_text == asked[0].retriever_text


@pytest.mark.parametrize(("orders", "number"), [("single", 1), ("cyclic", 3), ("all", 6)])
def test_training_draws_an_order(tmp_path, orders, number):
    task = MultipleChoiceTask(train_orders=orders)
    (record,) = records(tmp_path, ROW, task=task)
    drawn = [task.example(record, np.random.default_rng(seed)) for seed in range(80)]
    assert len({example.meta["order"] for example in drawn}) == number
    for example in drawn:
        place = "ABC".index(example.target_text[-1])
        assert example.choices[place].answer == "2"


def biased(example, liking):
    """A reader that knows a little (the right text is worth 1) and likes the letter A."""
    scores = np.array([float(choice.answer == "2") for choice in example.choices])
    scores[0] += liking
    return (scores - np.log(np.exp(scores).sum())).tolist()


def test_averaging_over_orders_takes_the_liking_for_a_letter_out(tmp_path):
    task = MultipleChoiceTask(eval_orders="cyclic")
    (record,) = records(tmp_path, ROW, task=task, need_targets=False)
    predictions = [
        Prediction(example, "", (), biased(example, liking=2.0))
        for example in task.variants(record)
    ]
    assert task.evaluate(predictions) == {"accuracy": 0.0, "debiased_accuracy": 1.0}
    plain = [Prediction(p.example, "", (), biased(p.example, 0.0)) for p in predictions]
    assert task.evaluate(plain) == {"accuracy": 1.0, "debiased_accuracy": 1.0}
    letters = [task.row_fields(one)["predicted_letter"] for one in plain]
    assert letters == ["B", "B", "B"]


@pytest.mark.parametrize(
    ("probs", "accuracy"), [((0.4, 0.35, 0.25), 0.0), ((0.2, 0.35, 0.45), 1.0)]
)
def test_a_repeated_option_is_two_options_and_either_letter_is_right(tmp_path, probs, accuracy):
    row = {**ROW, "options": {"A": "x", "B": "2", "C": "2"}}
    task = MultipleChoiceTask()
    example = task.example(*records(tmp_path, row))
    scores = task.evaluate([Prediction(example, "x", (), [math.log(p) for p in probs])])
    assert scores["accuracy"] == accuracy


def test_two_to_twenty_six_options(tmp_path):
    many = {letter: f"text {letter}" for letter in string.ascii_uppercase}
    task = MultipleChoiceTask(eval_orders="cyclic")
    row = {**ROW, "options": many, "answer": "Z"}
    (record,) = records(tmp_path, row, task=task, need_targets=False)
    asked = task.variants(record)
    assert len(asked) == 26
    assert {example.target_text[-1] for example in asked} == set(string.ascii_uppercase)
    every = MultipleChoiceTask(eval_orders="all")
    with pytest.raises(UserError, match=r":1: MultipleChoiceTask.eval_orders = 'all' would ask 26"):
        records(tmp_path, row, task=every, need_targets=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"A": "x"}, "answer": "A"}, "has the letters A; expected 2 to 26"),
        ({"options": {"A": "x", "C": "y"}}, "has the letters A, C; expected 2 to 26"),
        ({"options": {"A": "x", "B": " "}}, "option B must be a text that is not empty"),
        ({"options": {"A": "x", "B": 3}}, "option B must be a text that is not empty"),
        ({"answer": "D"}, "field 'answer' is 'D', expected one of A, B, C"),
        ({"answer": None}, "field 'answer' is None"),
        ({"options": ["x", "y"]}, "field 'options' must be an object"),
    ],
)
def test_a_broken_row_is_told_by_its_line(tmp_path, change, message):
    with pytest.raises(UserError, match=rf"choice\.jsonl:2: .*{message}"):
        records(tmp_path, ROW, {**ROW, "id": "m2", **change})


def test_a_format_has_the_question_once():
    with pytest.raises(UserError, match=r"query_format = .*needs \{question\} just once"):
        MultipleChoiceTask(query_format="{options}")
