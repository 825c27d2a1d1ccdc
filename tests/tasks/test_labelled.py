"""Every declared task of labels that the registry holds: files, words, choices, scores."""

from pathlib import Path
from typing import Any

import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.tasks.base import Prediction
from atlas_jax.tasks.boolq import BoolQTask
from atlas_jax.tasks.labelled import LabelledTask
from atlas_jax.tasks.registry import TASKS

LABELLED: Any = {
    name: task
    for name, task in TASKS.items()
    if isinstance(task, type) and issubclass(task, LabelledTask)
}


def lines(task: Any) -> list[dict[str, Any]]:
    """A line for each label."""
    asked = {name: f"some {name}" for name in task.asks}
    return [{**asked, task.label: label, "gold": ["p"]} for label in task.words]


def examples(task: Any, folder: Path, need_targets: bool = True) -> Any:
    write_jsonl(folder / "x.jsonl", lines(task))
    return [task.example(record) for record in task.load(folder / "x.jsonl", need_targets)]


def test_the_registry_holds_some() -> None:
    assert {"fever", "boolq"} <= set(LABELLED)


@pytest.mark.parametrize("name", LABELLED)
def test_each_label_is_its_word_and_what_is_right_scores(name: str, tmp_path: Path) -> None:
    task = LABELLED[name](answer_by="generation")
    found = examples(task, tmp_path)
    for example, (label, word) in zip(found, task.words.items(), strict=True):
        assert example.answers == (word,) and word in example.target_text
        assert all(f"some {field}" in example.query_text for field in task.asks)
        assert example.meta[task.label] == label and example.choices == ()
        assert task.row_fields(Prediction(example, word)) == {"predicted_label": label}
    right = [Prediction(one, one.answers[0]) for one in found]
    assert set(task.evaluate(right).values()) == {1.0}
    assert len(task.evaluate(right)) == 1 + len(task.words)
    wrong = [Prediction(one, "none of them") for one in found]
    assert task.evaluate(wrong)["accuracy"] == 0.0
    assert task.row_fields(wrong[0]) == {"predicted_label": None}
    chosen = examples(LABELLED[name](answer_by="likelihood"), tmp_path)[0].choices
    assert [choice.answer for choice in chosen] == list(task.words.values())


@pytest.mark.parametrize("name", LABELLED)
def test_what_is_wrong_is_named(name: str, tmp_path: Path) -> None:
    task = LABELLED[name]()
    (first, *_) = lines(task)
    kind = type(first[task.label])
    odd = "none of them" if kind is str else None
    write_jsonl(tmp_path / "x.jsonl", [{**first, task.label: odd}])
    with pytest.raises(UserError, match=rf"x.jsonl:1: field '{task.label}' is {odd!r}, expected"):
        task.load(tmp_path / "x.jsonl")
    del first[task.label]
    write_jsonl(tmp_path / "x.jsonl", [first])
    (record,) = task.load(tmp_path / "x.jsonl", need_targets=False)
    assert task.example(record).answers == ()
    own = type(task).__name__
    with pytest.raises(UserError, match=rf"{own}.query_format = .*no field {{other}}"):
        LABELLED[name](query_format="{other}")
    with pytest.raises(UserError, match=rf"{own}.answer_by = 'lot': expected 'generation' or"):
        LABELLED[name](answer_by="lot")


def test_a_yes_or_no_is_a_truth_value_and_no_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"question": "is it", "answer": "yes"}])
    with pytest.raises(UserError, match=r"x.jsonl:1: field 'answer'"):
        BoolQTask().load(tmp_path / "x.jsonl")
    asked = BoolQTask().typed("is lindel the capital of arvo")
    assert asked.query_text == "question: is lindel the capital of arvo? answer: <extra_id_0>"
