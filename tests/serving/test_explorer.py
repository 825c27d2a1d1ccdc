"""The explorer in a real browser: ask, cross out, edit, compare, link, error, keyboard, axe."""

from collections.abc import Iterator
from typing import Any

import pytest

from atlas_jax.serving.run import Server
from tests.serving.browsing import (
    DONE,
    MARKS,
    NOW,
    QUESTION,
    ask,
    faults,
    has,
    ids,
    opened,
    url,
    wait,
)

pytestmark = MARKS


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    with opened(browser, server) as page:
        yield page


def test_cross_out_edit_compare_and_a_link_to_all_of_it(page: Any, server: Server) -> None:
    ask(page)
    before = ids(page)
    assert len(before) == 4  # as many as the server finds
    assert page.query_selector_all(f"{NOW} .bars dt")[1].inner_text() == "attention"
    page.click("text=Keep to compare")
    page.click(f"{NOW} [data-do=cross] >> nth=0")
    wait(page, ".crossed")
    assert ids(page)[:3] == before[1:] and before[0] not in ids(page)
    assert len(page.query_selector_all(".pane")) == 2
    titles = [one.inner_text() for one in page.query_selector_all(".pane-title")]
    assert titles == ["Kept · 4 passages", "Now · 4 passages · 1 crossed out"]
    page.click(f"{NOW} [data-do=edit] >> nth=0")
    page.fill("textarea", "The capital of Arvo is <b>Nowhere</b>.")
    page.click("text=Save and ask again")
    wait(page, ".passage.edited")
    assert "<b>Nowhere</b>" in page.inner_text(f"{NOW} .passage.edited .text")
    shown, link = ids(page), page.url
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    other = page.context.new_page()
    other.goto(link)
    wait(other, ".passage.edited")
    assert ids(other) == shown and other.input_value("#question") == QUESTION
    page.click("text=Undo all changes")
    wait(page, f".passage[data-id='{before[0]}']")
    assert ids(page) == before
    assert page.complaints == []
    assert {one.split("/")[2] for one in page.asked} == {url(server).split("/")[2]}


def test_the_number_of_passages_and_search_alone(page: Any) -> None:
    ask(page)
    page.focus("#k")
    page.keyboard.press("ArrowLeft")
    has(page, f"{DONE} .passage", 3)
    assert page.inner_text("#k-value") == "3"
    page.check("input[value=search]")
    has(page, ".answer", 0)
    has(page, f"{DONE} .passage", 3)
    assert page.query_selector_all(f"{NOW} .bars dt")[-1].inner_text() == "score"


def test_by_keyboard_alone(page: Any) -> None:
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    wait(page)
    first = ids(page)[0]
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.do") == "edit":
            break
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.dataset.do") == "edit"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    wait(page, ".crossed")
    assert first not in ids(page)
    assert "Answer" in page.inner_text("#status")


FOUND = 'event: passages\ndata: {"index": 0, "question": "x", "passages": []}\n\n'


@pytest.mark.parametrize(
    ("status", "kind", "body", "words"),
    [
        (429, "application/problem+json", '{"detail": "64 questions are waiting"}',
         "64 questions are waiting"),
        # The server was killed: before anything was found, and while the answer was written.
        (200, "text/event-stream", "", "the connection ended before the answer was complete"),
        (200, "text/event-stream", FOUND, "the connection ended before the answer was complete"),
    ],
)  # fmt: skip
def test_an_error_is_told_and_what_was_there_stays(
    page: Any, status: int, kind: str, body: str, words: str
) -> None:
    ask(page)
    before = ids(page)
    page.route("**/v1/answers", lambda route: route.fulfill(
        status=status, content_type=kind, body=body,
    ))  # fmt: skip
    page.click(f"{NOW} [data-do=cross] >> nth=0")
    page.wait_for_selector(".problem")
    assert words in page.inner_text("[role=alert]")
    assert ids(page) == before


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(page: Any, theme: str) -> None:
    if theme == "dark":
        page.click("#theme")
    for step in ("welcome", "answer", "edit"):
        if step == "answer":
            ask(page)
            page.click("text=Keep to compare")
            page.click(f"{NOW} [data-do=cross] >> nth=0")
            wait(page, ".crossed")
        if step == "edit":
            page.click(f"{NOW} [data-do=edit] >> nth=0")
        assert faults(page) == [], step
