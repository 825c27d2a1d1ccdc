"""The corpora and questions that `benchmarks.reading` and the demo's users are measured with."""

import statistics
from collections import Counter

from atlas_jax.demo.factbook_relations import RELATIONS
from atlas_jax.demo.factbook_variants import WORDINGS, cut_again, found_again, reworded
from atlas_jax.tasks.metrics import answer_in_passage
from benchmarks.invented import invent


def test_an_invented_corpus_answers_its_questions() -> None:
    corpus = invent(3)
    passages, train, test = (corpus[name] for name in ("passages", "train", "test"))
    assert (len(passages), len(train), len(test)) == (300, 64, 150)
    assert len({p["title"] for p in passages}) == 300
    for question in (*train, *test):
        [gold] = question["gold"]
        passage = passages[int(gold)]
        assert passage["title"] in question["question"].replace("the House", "The House")
        assert answer_in_passage(passage["text"], question["answers"])
    assert not {q["gold"][0] for q in train} & {q["gold"][0] for q in test}
    lengths = [len(p["text"].split()) for p in passages]
    assert min(lengths) < 30 and max(lengths) > 100 and 50 < statistics.mean(lengths) < 100


def test_a_third_of_the_test_questions_has_words_of_its_own() -> None:
    corpus = invent(0)
    assert not any(question["unseen"] for question in corpus["train"])
    unseen = Counter(question["unseen"] for question in corpus["test"])
    assert 0.2 < unseen[True] / len(corpus["test"]) < 0.45
    assert invent(0) == corpus and invent(1)["passages"] != corpus["passages"]


def test_every_relation_has_another_wording() -> None:
    known = {wording for relation in RELATIONS for wording in relation.wordings}
    assert set(WORDINGS) == {relation.name for relation in RELATIONS}
    assert not known & set(WORDINGS.values())
    asked = reworded({"id": "1", "relation": "capital", "title": "Bahamas, The", "answers": ["x"]})
    assert asked["question"].startswith("From which town is ") and asked["answers"] == ["x"]


def test_a_corpus_is_cut_anew_and_its_questions_find_their_passages() -> None:
    rows = [
        {"id": "a1", "title": "A", "text": "one two three"},
        {"id": "a2", "title": "A", "text": "four five"},
        {"id": "b1", "title": "B", "text": "six two"},
    ]
    pieces = cut_again(rows, 4)
    assert [(p["title"], p["text"]) for p in pieces] == [
        ("A", "one two three four"), ("A", "five"), ("B", "six two"),
    ]  # fmt: skip
    assert len({p["id"] for p in pieces}) == 3
    asked = [
        {"title": "A", "answers": ["five"]},
        {"title": "A", "answers": ["two"]},
        {"title": "B", "answers": ["five"]},
    ]
    found = found_again(asked, pieces)
    assert [q["gold"] for q in found] == [[pieces[1]["id"]], [pieces[0]["id"]]]
