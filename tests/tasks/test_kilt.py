"""Task `kilt`: the published format in and out, and the scores of the published script."""

import json

import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.tasks.base import Example, Prediction
from atlas_jax.tasks.kilt import KILTTask

ROW = {
    "id": "6915606477668963399",
    "input": "what do the 3 dots mean in math",
    "output": [
        {"answer": "the therefore sign ", "provenance": [{"wikipedia_id": "10593264"}]},
        {"answer": "therefore"},
        {"answer": "therefore", "meta": {"score": 1}},
    ],
    "meta": {"left_context": ""},
}


def load(tmp_path, *rows, need_targets=True, name="kilt.jsonl"):
    path = tmp_path / name
    write_jsonl(path, rows)
    return KILTTask().load(path, need_targets)


def predict(output, pages, answer=None):
    example = Example("1", "q", "q", meta={"gold_output": output})
    passages = [{"id": f"{page}:{n}", "title": "t"} for n, page in enumerate(pages)]
    answers = tuple(one["answer"] for one in output if "answer" in one)
    example = Example("1", "q", "q", answers=answers, meta={"gold_output": output})
    return Prediction(example, answer, passages)


def sets(*pages):
    return [{"provenance": [{"wikipedia_id": page} for page in one]} for one in pages]


def test_a_published_row_becomes_an_example(tmp_path):
    (record,) = load(tmp_path, ROW)
    example = KILTTask().example(record)
    assert example.query_text == "question: what do the 3 dots mean in math answer: <extra_id_0>"
    assert example.answers == ("the therefore sign", "therefore")
    assert example.target_text == "<extra_id_0> the therefore sign"
    assert example.id == ROW["id"]


def test_a_test_file_has_no_output(tmp_path):
    row = {"id": "1", "input": "who?"}
    assert KILTTask().example(*load(tmp_path, row, need_targets=False)).answers == ()
    with pytest.raises(UserError, match=r"kilt\.jsonl:1: field 'output' gives no answer"):
        load(tmp_path, row)


def test_fevers_claims_can_be_learnt_and_scored_as_words(tmp_path):
    """true for SUPPORTS and false for REFUTES, as in Atlas; other tasks stay as they are."""
    claims = [
        {"id": "1", "input": "Lindel lies in Arvo.", "output": [{"answer": "SUPPORTS"}]},
        {"id": "2", "input": "Lindel lies in Bera.", "output": [{"answer": "REFUTES"}]},
    ]
    task = KILTTask(fever_answers="words")
    first, second, other = map(task.example, load(tmp_path, *claims, ROW))
    assert (first.answers, first.target_text) == (("true",), "<extra_id_0> true")
    assert (second.answers, second.target_text) == (("false",), "<extra_id_0> false")
    assert other.answers == ("the therefore sign", "therefore")
    written = [Prediction(first, "true"), Prediction(second, "true"), Prediction(other, "true")]
    assert task.evaluate(written[:2])["accuracy"] == 0.5
    outputs = [task.row_fields(one)["output"][0]["answer"] for one in written]
    assert outputs == ["SUPPORTS", "SUPPORTS", "true"], "KILT's script compares labels"
    assert KILTTask().example(*load(tmp_path, claims[0])).answers == ("SUPPORTS",)
    with pytest.raises(UserError, match="KILTTask.fever_answers = 'numbers'"):
        KILTTask(fever_answers="numbers")


@pytest.mark.parametrize(
    ("name", "answer"), [("fever-test-kilt.jsonl", "REFUTES"), ("trex-test-kilt.jsonl", "false")]
)
def test_a_claim_without_answers_is_known_by_its_file(tmp_path, name, answer):
    task = KILTTask(fever_answers="words")
    (record,) = load(tmp_path, {"id": "1", "input": "c"}, need_targets=False, name=name)
    row = task.row_fields(Prediction(task.example(record), "false"))
    assert row["output"][0]["answer"] == answer


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (["x"], r":1: output\[0\] must be an object"),
        ([{"answer": 3}], r":1: output\[0\]: field 'answer' must be a string"),
        ([{"answer": "x", "provenance": ["y"]}], r"'provenance' must hold objects"),
        ([{"provenance": [{"wikipedia_id": [1]}]}], r"provenance: field 'wikipedia_id' must be"),
    ],
)
def test_a_broken_output_is_told_by_its_place(tmp_path, output, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, {"id": "1", "input": "q", "output": output})


# (output, pages found, R-precision, recall@5), the last two as facebookresearch/KILT's
# eval_retrieval.py (commit 16c6b18 and later) gives them.
SIX = list("123456")
PUBLISHED = [
    (sets("1"), SIX, 1.0, 1.0),
    (sets("3"), SIX, 0.0, 1.0),
    (sets("14"), SIX, 0.5, 1.0),
    (sets("12", "5"), list("132456"), 0.5, 1.0),
    (sets("16", "5", "5"), list("132456"), 0.5, 1.0),
    (sets("12", "23"), list("2134567"), 1.0, 1.0),
    ([*sets("", "2"), {"answer": "y"}], list("123"), 0.0, 0.5),
    ([{"answer": "y"}], list("123"), 0.0, 0.0),
]


def test_a_page_without_an_id_is_none():
    output = [{"answer": "y", "provenance": [{"wikipedia_id": None}, {"wikipedia_id": "1"}]}]
    scores = KILTTask().evaluate([predict(output, ["1", "2"], "y")])
    assert scores["r_precision"] == 1.0


@pytest.mark.parametrize(("output", "pages", "r_precision", "recall"), PUBLISHED)
def test_retrieval_scores_are_those_of_the_published_script(output, pages, r_precision, recall):
    known = predict(sets("1"), ["1"])  # so that there is provenance in any case
    scores = KILTTask().evaluate([predict(output, pages), known])
    assert scores["r_precision"] == pytest.approx((r_precision + 1) / 2)
    assert scores["recall@5"] == pytest.approx((recall + 1) / 2)


def test_kilt_scores_need_the_right_page_too():
    right = [{"answer": "the Nile", "provenance": [{"wikipedia_id": "1"}]}]
    scores = KILTTask().evaluate(
        [
            predict(right, ["1", "2"], "Nile"),
            predict(right, ["2", "1"], "Nile"),
            predict(right, ["1"], "river Nile"),
        ]
    )
    assert scores["exact_match"] == pytest.approx(2 / 3)
    assert scores["kilt_exact_match"] == pytest.approx(1 / 3)
    assert scores["f1"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert scores["kilt_f1"] == pytest.approx((1 + 2 / 3) / 3)
    assert scores["kilt_rougeL"] == pytest.approx((2 / 3 + 0.5) / 3)


def test_a_prediction_is_a_line_that_the_published_script_reads():
    row = KILTTask().row_fields(predict(sets("1"), ["7", "7", "8"], "Nile"))
    assert json.loads(json.dumps(row)) == {
        "output": [
            {
                "answer": "Nile",
                "provenance": [
                    {"wikipedia_id": "7", "title": "t"},
                    {"wikipedia_id": "8", "title": "t"},
                ],
            }
        ]
    }


def test_pages_can_be_known_by_their_title():
    task = KILTTask(page="title")
    example = Example("1", "q", "q", meta={"gold_output": [{"provenance": [{"title": "Nile"}]}]})
    found = [{"id": "a", "title": "Oder"}, {"id": "b", "title": "Nile"}]
    scores = task.evaluate([Prediction(example, None, found)])
    assert scores == {"r_precision": 0.0, "recall@5": 1.0}
