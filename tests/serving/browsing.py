"""A browser on the explorer, and what the tests do and see in it."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from atlas_jax.serving.run import Server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), "")
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium of the distribution's packages"),
]
QUESTION = "What is the capital of Arvo?"
NOW = ".pane:last-child"
DONE = f"{NOW}[aria-busy=false]"


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """A browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra [browser]")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Any, server: Server) -> Iterator[Any]:
    """The page on a phone, with everything noted that it asked for and complained of."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, base_url=url(server))
    page = context.new_page()
    page.asked, page.complaints = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on(
        "console",
        lambda line: page.complaints.append(line.text) if line.type == "error" else None,
    )
    page.goto("/")
    page.wait_for_selector(".sample")
    yield page
    context.close()


def url(server: Server) -> str:
    """Where the page is."""
    return f"http://127.0.0.1:{server.address[1]}"


def ids(page: Any) -> list[str]:
    """Of the passages that are shown."""
    return [one.get_attribute("data-id") for one in page.query_selector_all(f"{NOW} .passage")]


def has(page: Any, selector: str, count: int) -> None:
    """Wait until there are so many of these."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_count(count, timeout=20_000)


def wait(page: Any, condition: str = "") -> None:
    """Wait for an answer in which there is this."""
    page.wait_for_selector(f"{DONE} {condition}", timeout=20_000)


def ask(page: Any, question: str = QUESTION) -> None:
    """Type a question and wait for its answer."""
    page.fill("#question", question)
    page.keyboard.press("Enter")
    wait(page)


def faults(page: Any) -> list[tuple[str, list[str]]]:
    """What axe finds fault with."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page.wait_for_timeout(400)  # bars move
    found = axe.run(page).response["violations"]
    return [(one["id"], [n["html"] for n in one["nodes"]]) for one in found]
