import pytest

from atlas_jax.demo.bm25 import bm25_recall, search, singular

PASSAGES = [
    {"id": "a", "title": "Chad", "section": "Government: Capital", "text": "Capital: N'Djamena."},
    {"id": "b", "title": "Peru", "section": "Government: Capital", "text": "Capital: Lima."},
    {"id": "c", "title": "Peru", "section": "Economy: Exports", "text": "Exports: copper, gold."},
]


def test_search_ranks_by_shared_words():
    assert search(PASSAGES, ["what is the capital of Peru", "the export of Peru"], k=2) == [
        ["b", "a"],
        ["c", "b"],
    ]


def test_recall_counts_any_gold_passage():
    questions = [
        {"question": "capital of Peru", "gold": ["b"]},
        {"question": "capital of Peru", "gold": ["c", "a"]},
    ]
    recall = bm25_recall(PASSAGES, questions, at=(1, 3))
    assert recall == {"recall@1": 50.0, "recall@3": 100.0}


@pytest.mark.parametrize(
    ("word", "stem"),
    [("cities", "city"), ("exports", "export"), ("grapes", "grape"), ("census", "census"),
     ("congress", "congress")],
)  # fmt: skip
def test_singular(word, stem):
    assert singular(word) == stem
