"""Versions in the explorer: the list, one question as of two of them, the link, keyboard, axe."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import atlas_jax
from atlas_jax.serving.run import Server
from tests.serving.browsing import MARKS, NOW, ask, faults, has, ids, opened, url, wait
from tests.serving.served import load_kept, send, serving

pytestmark = MARKS


@pytest.fixture(scope="module")
def versioned(kept: Path) -> Iterator[Server]:
    """A server of a store whose first passage was replaced, then deleted."""
    told = {"model": kept / "model", "store": kept / "store", "index": kept / "index"}
    new = {"id": "p0", "title": "Arvo", "text": "The capital of Arvo is Nova, since yesterday."}
    atlas_jax.change_index(**told, replace=[new], add=[{**new, "id": "fresh"}])
    atlas_jax.change_index(**told, delete=["p0", "fresh"])
    with serving(load_kept(kept), max_choices=0) as running:
        yield running


@pytest.fixture
def page(browser: Any, versioned: Server) -> Iterator[Any]:
    with opened(browser, versioned) as page:
        yield page


def rows(page: Any) -> list[str]:
    return [" ".join(one.inner_text().split()) for one in page.query_selector_all(".version")]


def test_two_versions_side_by_side_and_a_link_to_them(page: Any, versioned: Server) -> None:
    ask(page, "Arvo")
    now = ids(page)
    assert len(rows(page)) == 3 and not {"p0", "fresh"} & {*now}
    assert "2 deleted" in rows(page)[0] and rows(page)[0].endswith("now")
    assert "1 added 1 replaced 17 passages" in rows(page)[1]
    page.click(".version[data-version='1'] button")
    has(page, ".pane", 2)
    wait(page, ".passage[data-id=fresh]")
    then = ids(page)
    body = {"questions": "Arvo", "k": 4, "as_of": 1}
    expected = send(versioned, "/v1/retrieve", body).json["results"][0]["passages"]
    assert then == [one["id"] for one in expected]
    titles = [one.inner_text() for one in page.query_selector_all(".pane-title")]
    assert "Now, version 2" in titles[0] and "As of version 1" in titles[1]
    assert page.query_selector_all(f"{NOW} .moved.new")
    assert not page.query_selector_all(".was")  # it is no change of the newest one
    assert page.evaluate("document.querySelector('.pane').getBoundingClientRect().top") >= 0
    assert page.input_value("#version") == "1"
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    other = page.context.new_page()
    other.goto(page.url)
    has(other, ".pane[aria-busy=false]", 2)
    wait(other, ".passage[data-id=fresh]")
    assert ids(other) == then
    assert [one.get_attribute("data-id") for one in
            other.query_selector_all(".pane:first-child .passage")] == now  # fmt: skip
    assert page.complaints == []
    assert {one.split("/")[2] for one in page.asked} == {url(versioned).split("/")[2]}


def test_a_version_is_chosen_by_keyboard(page: Any) -> None:
    ask(page, "Arvo")
    page.focus("#version")
    page.keyboard.press("ArrowDown")
    wait(page, ".passage[data-id=fresh]")
    assert "as of version 1" in page.inner_text(f"{NOW} .note")
    page.focus(".version[data-version='0'] button")
    page.keyboard.press("Enter")
    has(page, ".pane[aria-busy=false]", 2)
    assert page.evaluate("document.activeElement.classList.contains('pane')")
    assert "v=0" in page.url and "beside=" in page.url


def test_a_version_that_is_gone_is_told(page: Any, versioned: Server) -> None:
    page.goto(f"{url(versioned)}/#q=Arvo&v=7")
    page.reload()
    page.wait_for_selector(".problem")
    assert "has the versions 0 to 2" in page.inner_text("[role=alert]")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(page: Any, theme: str) -> None:
    if theme == "dark":
        page.click("#theme")
    assert faults(page) == []
    ask(page, "Arvo")
    page.click(".version[data-version='1'] button")
    has(page, ".pane[aria-busy=false]", 2)
    assert faults(page) == []
