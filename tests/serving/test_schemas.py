"""Requests are taken as they are or refused by name, and no reply holds what JSON does not."""

import json
import math

import pytest
from pydantic import ValidationError

from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.serving.faults import validated
from atlas_jax.serving.openapi import description
from atlas_jax.serving.schemas import (
    AnswerReply,
    AnswersRequest,
    GivenPassage,
    PassageReply,
    PassagesRequest,
    Timings,
)

ASKED = {"questions": "x"}
PASSAGE = {"id": "a", "text": "b"}
FAULTS = [
    (AnswersRequest, [], "expected an object, got a list"),
    (AnswersRequest, None, "expected an object, got null"),
    (AnswersRequest, {"k": 1}, "the field questions is missing"),
    (AnswersRequest, {"questions": 5}, "questions: expected a text or a list, got a whole number"),
    (AnswersRequest, {"questions": ["x", 1]}, "questions[1]: expected a text, got a whole number"),
    (AnswersRequest, {**ASKED, "k": "5"}, "k: expected a whole number, got a text"),
    (AnswersRequest, {**ASKED, "k": True}, "k: expected a whole number, got true or false"),
    (AnswersRequest, {**ASKED, "k": 5.0}, "k: expected a whole number, got a decimal number"),
    (AnswersRequest, {**ASKED, "k": -1}, "k: expected a whole number of 0 or more, got -1"),
    (AnswersRequest, {**ASKED, "explain": 1}, "explain: expected true or false, got a whole"),
    (AnswersRequest, {**ASKED, "explain": "yes"}, "explain: expected true or false, got a text"),
    (AnswersRequest, {**ASKED, "as_of": True}, "as_of: expected a text or a whole number"),
    (AnswersRequest, {**ASKED, "exclude": "p1"}, "exclude: expected a list, got a text"),
    (AnswersRequest, {**ASKED, "replace": {"p": None}}, "replace.p: expected a text, got null"),
    (AnswersRequest, {**ASKED, "replace": {"str": 1}}, "replace.str: expected a text"),
    (AnswersRequest, {**ASKED, "decoding": "best"}, "decoding: expected '', 'greedy',"),
    (AnswersRequest, {**ASKED, "kk": 5}, "the field kk is unknown; the fields are questions, k,"),
    (PassagesRequest, {"passages": [3]}, "passages[0]: expected an object, got a whole number"),
    (PassagesRequest, {"passages": [{"id": "a"}]}, "the field passages[0].text is missing"),
    (PassagesRequest, {"passages": [PASSAGE, {**PASSAGE, "body": ""}]},
     "the field passages[1].body is unknown; the fields are id, text, title, section"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "sent", "words"), FAULTS)
def test_a_fault_is_named_and_nothing_becomes_another_type(kind, sent, words) -> None:
    with pytest.raises(UserError) as caught:
        validated(strict_json.parse(json.dumps(sent).encode(), "the body"), kind, "the body")
    assert str(caught.value).startswith(f"the body: {words}")


def test_what_is_right_is_taken_as_it_is() -> None:
    sent = {"questions": ["x", "y"], "k": 3, "as_of": 2, "replace": {"p": "t"}, "explain": True}
    taken = validated(sent, AnswersRequest, "the body")
    assert taken.model_dump(exclude_unset=True) == sent and type(taken.as_of) is int
    given = validated({"passages": [PASSAGE]}, PassagesRequest, "the body").passages
    assert given == [GivenPassage(id="a", text="b")]
    assert AnswersRequest(questions="x").exclude == []
    with pytest.raises(ValidationError, match="frozen"):
        taken.k = 5  # type: ignore[misc]


@pytest.mark.parametrize("sent", [{"questions": [1] * 80_000}, {"passages": [{}] * 80_000}])
def test_many_faults_cost_no_more_than_one(sent) -> None:
    kind = AnswersRequest if "questions" in sent else PassagesRequest
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(sent)
    assert caught.value.error_count() <= 2


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_reply_holds_a_number_that_json_has_not(number: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        PassageReply(id="a", title="", section="", text="b", score=number)
    with pytest.raises(ValidationError, match="finite"):
        Timings(waited=number, found=0.0, read=0.0, batch=1, rows=1)


def test_numbers_keep_every_bit_and_what_is_unknown_is_left_out() -> None:
    score = 0.1 + 0.2
    passage = PassageReply(id="a", title="", section="", text="b\u2028\u05d0", score=score)
    timings = Timings(waited=0.1, found=1e-9, read=2.0, batch=1, rows=1)
    reply = AnswerReply(
        question="x", answer="", log_probability=None, passages=[passage], timings=timings
    )
    told = json.loads(reply.model_dump_json())
    assert told["passages"] == [
        {"id": "a", "title": "", "section": "", "text": "b\u2028\u05d0", "score": score}
    ]
    assert told["log_probability"] is None and told["index"] is None


def test_the_description_says_what_is_refused() -> None:
    schemas = description()["components"]["schemas"]
    for kind in (AnswersRequest, PassagesRequest, GivenPassage):
        assert schemas[kind.__name__]["additionalProperties"] is False
    assert schemas["AnswersRequest"]["properties"]["k"]["maximum"] == 1 << 20
    assert schemas["PassageReply"]["required"] == ["id", "title", "section", "text"]
    assert schemas["AnswersRequest"]["required"] == ["questions"]
