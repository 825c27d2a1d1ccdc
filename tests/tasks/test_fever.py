"""Task `fever`: claims, labels and their words."""

import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.tasks.base import Prediction
from atlas_jax.tasks.fever import FeverTask

ROWS = [
    {"id": 91, "claim": "Lindel lies in Arvo.", "label": "SUPPORTS", "gold": ["arvo-1"]},
    {"id": 92, "claim": "Lindel lies in Bera.", "label": "REFUTES", "gold": ["arvo-1"]},
    {"id": 93, "claim": "Lindel has a zoo.", "label": "NOT ENOUGH INFO"},
]


def examples(tmp_path, task, rows=ROWS, need_targets=True):
    path = tmp_path / "claims.jsonl"
    write_jsonl(path, rows)
    return [task.example(record) for record in task.load(path, need_targets)]


def test_labels_become_words(tmp_path):
    first, second, third = examples(tmp_path, FeverTask())
    assert first.query_text == "question: Lindel lies in Arvo. answer: <extra_id_0>"
    assert [e.target_text for e in (first, second, third)] == [
        "<extra_id_0> true", "<extra_id_0> false", "<extra_id_0> maybe"
    ]  # fmt: skip
    assert (first.id, first.gold_ids, first.choices) == ("91", ("arvo-1",), ())


def test_the_three_words_can_be_chosen_from(tmp_path):
    (first, *_) = examples(tmp_path, FeverTask(answer_by="likelihood"))
    assert [choice.answer for choice in first.choices] == ["true", "false", "maybe"]
    assert first.choices[2].target_text == "<extra_id_0> maybe"
    assert first.choice_score == "likelihood"


def test_accuracy_in_all_and_by_label(tmp_path):
    task = FeverTask()
    asked = examples(tmp_path, task)
    passages = [{"id": "arvo-1", "title": "Arvo", "text": "true and false"}]
    written = ["True.", "perhaps", "maybe"]
    predictions = [
        Prediction(example, answer, passages)
        for example, answer in zip(asked, written, strict=True)
    ]
    assert task.evaluate(predictions, recall_at=(1,)) == {
        "accuracy": pytest.approx(2 / 3),
        "accuracy_supports": 1.0,
        "accuracy_refutes": 0.0,
        "accuracy_not_enough_info": 1.0,
        "recall@1": 1.0,
    }
    labels = [task.row_fields(one)["predicted_label"] for one in predictions]
    assert labels == ["SUPPORTS", None, "NOT ENOUGH INFO"]


@pytest.mark.parametrize(
    ("compare", "written", "right"),
    [("normalised", "True.", 1.0), ("literal", "True.", 0.0), ("literal", "true", 1.0)],
)
def test_accuracy_compares_but_for_case_and_signs_or_to_the_letter(
    tmp_path, compare, written, right
):
    task = FeverTask(compare=compare)
    (claim, *_) = examples(tmp_path, task)
    prediction = Prediction(claim, written)
    assert task.evaluate([prediction])["accuracy"] == right
    assert task.row_fields(prediction)["predicted_label"] == ("SUPPORTS" if right else None)
    with pytest.raises(UserError, match="FeverTask.compare = 'exact'"):
        FeverTask(compare="exact")


def test_a_claim_without_label_can_be_asked_but_not_learnt(tmp_path):
    rows = [{"claim": "Lindel lies in Arvo."}]
    (example,) = examples(tmp_path, FeverTask(), rows, need_targets=False)
    assert (example.answers, example.target_text) == ((), "")
    with pytest.raises(UserError, match=r"claims\.jsonl:1: field 'label' is None, expected one of"):
        examples(tmp_path, FeverTask(), rows)


def test_another_label_is_refused_by_its_line(tmp_path):
    rows = [*ROWS, {"claim": "x", "label": "supports"}]
    with pytest.raises(UserError, match=r"claims\.jsonl:4: field 'label' is 'supports'"):
        examples(tmp_path, FeverTask(), rows, need_targets=False)
