"""The explorer in a real browser: ask, cross out, edit, compare, link, error, keyboard, axe."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from atlas_jax.serving.run import Server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), "")
pytest.importorskip("playwright", reason="needs the extra [browser]")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium of the distribution's packages"),
]
QUESTION = "What is the capital of Arvo?"
NOW = ".pane:last-child"
DONE = f"{NOW}[aria-busy=false]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page on a phone, with everything noted that it asked for and complained of."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, base_url=url(server))
    opened = context.new_page()
    opened.asked, opened.complaints = [], []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on(
        "console",
        lambda line: opened.complaints.append(line.text) if line.type == "error" else None,
    )
    opened.goto("/")
    opened.wait_for_selector(".sample")
    yield opened
    context.close()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.address[1]}"


def ids(page: Any) -> list[str]:
    return [one.get_attribute("data-id") for one in page.query_selector_all(f"{NOW} .passage")]


def has(page: Any, selector: str, count: int) -> None:
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_count(count, timeout=20_000)


def wait(page: Any, condition: str = "") -> None:
    page.wait_for_selector(f"{DONE} {condition}", timeout=20_000)


def ask(page: Any, question: str = QUESTION) -> None:
    page.fill("#question", question)
    page.keyboard.press("Enter")
    wait(page)


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


def test_an_error_is_told_and_what_was_there_stays(page: Any, server: Server) -> None:
    ask(page)
    before = ids(page)
    page.route("**/v1/answers", lambda route: route.fulfill(
        status=429, content_type="application/problem+json",
        body='{"detail": "64 questions are waiting; ask again in 2 s"}',
    ))  # fmt: skip
    page.click(f"{NOW} [data-do=cross] >> nth=0")
    page.wait_for_selector(".problem")
    assert "64 questions are waiting" in page.inner_text("[role=alert]")
    assert ids(page) == before


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(page: Any, theme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
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
        page.wait_for_timeout(400)  # bars move
        found = axe.run(page).response["violations"]
        assert [(one["id"], [n["html"] for n in one["nodes"]]) for one in found] == [], step
