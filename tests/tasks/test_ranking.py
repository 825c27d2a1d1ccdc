"""Task `ranking`: nDCG and recall with graded judgements."""

import math

import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.tasks.base import Prediction
from atlas_jax.tasks.metrics import ndcg_at_k, share_found_at_k
from atlas_jax.tasks.ranking import RankingTask


def test_ndcg_by_hand():
    grades = {"a": 2, "b": 1, "c": 0}
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    assert ndcg_at_k(["a", "b"], grades, 10) == 1.0
    assert ndcg_at_k(["x", "a", "c", "b"], grades, 10) == pytest.approx(
        (2 / math.log2(3) + 1 / math.log2(5)) / ideal
    )
    assert ndcg_at_k(["x", "a"], grades, 1) == 0.0
    assert ndcg_at_k(["a"], {"a": 0}, 10) == 0.0
    assert ndcg_at_k(["a", "b"], {"a": -1, "b": 1}, 10) == pytest.approx(1 / math.log2(3))


def test_recall_is_the_share_of_the_relevant():
    grades = {"a": 2, "b": 1, "c": 0}
    assert share_found_at_k(["c", "b", "a"], grades, 2) == 0.5
    assert share_found_at_k(["c", "b", "a"], grades, 100) == 1.0


def test_a_file_is_read_and_scored(tmp_path):
    path = tmp_path / "test.jsonl"
    write_jsonl(path, [{"id": "q", "question": "who?", "qrels": {"a": 1, "b": 2, "c": 2}}])
    task = RankingTask()
    (record,) = task.load(path)
    example = task.example(record)
    assert (example.gold_ids, example.excluded_ids) == (("b", "c"), ("q",))
    found = [{"id": "b"}, {"id": "x"}]
    scores = task.evaluate([Prediction(example, None, found)], recall_at=(1, 100))
    assert scores == {
        "ndcg@10": pytest.approx(2 / (2 + 2 / math.log2(3) + 1 / math.log2(4))),
        "recall@1": pytest.approx(1 / 3),
        "recall@100": pytest.approx(1 / 3),
    }


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ({"a": "1"}, "must hold a number"),
        ({"a": True}, "must hold a number"),
        ({"a": 0}, "no grade above 0"),
    ],
)
def test_broken_judgements_are_told_by_line(tmp_path, qrels, message):
    path = tmp_path / "test.jsonl"
    write_jsonl(path, [{"question": "who?", "qrels": qrels}])
    with pytest.raises(UserError, match=rf"test\.jsonl:1: field 'qrels' .*{message}"):
        RankingTask().load(path)
