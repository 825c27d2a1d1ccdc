import pytest

from atlas_jax.demo.index_swap import choose, judge, other_value, replaced


@pytest.mark.parametrize(
    ("text", "old", "new", "expected"),
    [
        ("President Bajram BEGAJ (since", "Bajram Begaj", "Li Wei", "President Li Wei (since"),
        ("area: 1,261 sq km; land: 261 sq km.", "261", "77", "area: 1,261 sq km; land: 77 sq km."),
        ("Oman, Omani, oman", "Oman", "Chad", "Chad, Omani, Chad"),
        ("a $1.5 b", "$1.5", r"\1 $2", r"a \1 $2 b"),
        ("nothing", "else", "new", "nothing"),
    ],
)
def test_replaced(text, old, new, expected):
    assert replaced(text, old, new) == expected


def _question(entity, relation, answers, group="static"):
    return {
        "id": f"{entity}-{relation}",
        "question": f"{relation} of {entity}?",
        "answers": answers,
        "title": entity,
        "relation": relation,
        "group": group,
        "gold": [f"{entity}-p"],
    }


QUESTIONS = [
    _question("albania", "capital", ["Tirana", "Tirane"]),
    _question("chad", "capital", ["N'Djamena"]),
    _question("sri lanka", "capital", ["Sri Jayewardenepura Kotte"]),
    _question("albania", "leader", ["Bajram Begaj"], "temporal"),
    _question("chad", "leader", ["Mahamat Deby"], "temporal"),
]
PASSAGES = {
    f"{e}-p": {"id": f"{e}-p", "title": e, "section": "", "text": text}
    for e, text in {
        "albania": "Capital: Tirana.",
        "chad": "Capital: N'Djamena. Leader: Mahamat DEBY (since 2024).",
        "sri lanka": "Capital: Colombo.",
    }.items()
}


def _prediction(question_id, answer, passage="", score=1.0):
    entity = question_id.rsplit("-", 1)[0]
    return {
        "id": question_id,
        "prediction": answer,
        "passages": [{"id": passage or f"{entity}-p", "score": score}],
    }


def test_other_value_prefers_answers_of_the_same_length_and_never_an_accepted_one():
    assert other_value(QUESTIONS[0], QUESTIONS) == "N'Djamena"
    assert other_value(QUESTIONS[0], [QUESTIONS[0], QUESTIONS[2]]) == "Sri Jayewardenepura Kotte"
    same = _question("x", "capital", ["tirane"])
    assert other_value(QUESTIONS[0], [QUESTIONS[0], same]) is None


def test_candidates_are_right_answers_read_from_a_first_ranked_gold_passage():
    predictions = [
        _prediction("albania-capital", "tirana"),
        _prediction("chad-capital", "Paris"),  # wrong
        _prediction("chad-leader", "Mahamat Deby", score=0.5),
        _prediction("albania-leader", "Bajram Begaj", passage="chad-p"),  # not gold
        _prediction("sri lanka-capital", "Sri Jayewardenepura Kotte"),  # passage lacks it
    ]
    chosen = choose(predictions, QUESTIONS, PASSAGES, count=5)
    assert [c.question["id"] for c in chosen] == ["chad-leader", "albania-capital"]
    assert chosen[0].passage["text"] == "Capital: N'Djamena. Leader: Bajram Begaj (since 2024)."
    assert chosen[1].passage["text"] == "Capital: N'Djamena."
    assert chosen[1].row["answers"] == ["N'Djamena"]
    assert choose(predictions, QUESTIONS, PASSAGES, count=1) == chosen[:1]
    assert PASSAGES["albania-p"]["text"] == "Capital: Tirana."


def test_a_relation_and_a_passage_are_swapped_once():
    predictions = [_prediction(f"{e}-capital", a) for e, a in
                   [("albania", "Tirana"), ("chad", "N'Djamena")]]  # fmt: skip
    predictions.append(_prediction("chad-leader", "Mahamat Deby"))
    chosen = choose(predictions, QUESTIONS, PASSAGES, count=5)
    assert [c.question["id"] for c in chosen] == ["chad-leader", "albania-capital"]


def test_judge_says_which_answers_followed():
    chosen = choose([_prediction("albania-capital", "Tirana")], QUESTIONS, PASSAGES, count=1)
    for answer, follows in [("n'djamena", True), ("Tirana", False), ("", False)]:
        (swap,) = judge(chosen, {"albania-capital": answer})
        assert (swap.answer_before, swap.answer_after) == ("Tirana", answer)
        assert swap.follows is follows
