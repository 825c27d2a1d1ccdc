"""Takes the pictures of docs/serving.md from a server that runs: versions side by side.

    python docs/explorer_pictures.py http://127.0.0.1:8080 "Who leads Uruguay?" 0 work/pictures

The arguments: the server, a question, an earlier version of its corpus, and a folder. Each page is
taken at three widths, light and dark, also while the words of an answer arrive. Needs Chromium and
the extra [browser]. docs/explorer_versions.png is of the mini pair over the Factbook's passages of
Uruguay and Peru, one of which had a president of before in version 0.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

WIDTHS = {"phone": (390, 844), "tablet": (820, 1000), "wide": (1180, 946)}
DONE = ".pane:last-child[aria-busy=false]"
# A reply's events arrive too fast for a picture.
SLOWLY = """
const fetched = window.fetch;
window.fetch = async (...told) => {
  const reply = await fetched(...told);
  if (!String(told[0]).includes("answers") || !reply.body) return reply;
  const events = new TextDecoder();
  const slow = new TransformStream({
    async transform(chunk, out) {
      for (const one of events.decode(chunk, {stream: true}).split(/(?<=\\n\\n)/)) {
        out.enqueue(new TextEncoder().encode(one));
        if (one.startsWith("event: tokens")) await new Promise((go) => setTimeout(go, 1500));
      }
    },
  });
  return new Response(reply.body.pipeThrough(slow), reply);
};
"""


def take(browser: Any, told: list[str], name: str, scheme: str) -> None:
    """All pictures of one width."""
    server, question, version, folder = told
    width, height = WIDTHS[name]
    size = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
    context = browser.new_context(base_url=server, **size)

    def picture(page: Any, what: str) -> None:
        page.screenshot(path=Path(folder) / f"{what}-{name}-{scheme}.png")

    page = context.new_page()
    page.goto("/")
    page.fill("#k", "2")
    page.fill("#question", question)
    page.click("#submit")
    page.wait_for_selector(DONE)
    page.click(f".version[data-version='{version}'] button")
    page.wait_for_selector(f".pane + {DONE}")
    page.wait_for_timeout(500)
    picture(page, "versions")
    page.locator("#versions").scroll_into_view_if_needed()
    picture(page, "list")
    slow = context.new_page()
    slow.add_init_script(SLOWLY)
    slow.goto("/")
    slow.fill("#question", question)
    slow.click("#submit")
    slow.wait_for_selector(".pane[aria-busy=true] .passage")
    slow.wait_for_timeout(1800)
    picture(slow, "words")
    context.close()


def main() -> None:
    """Take them all."""
    *told, folder = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name in WIDTHS:
            for scheme in ("light", "dark"):
                take(browser, [*told, folder], name, scheme)
        browser.close()


if __name__ == "__main__":
    main()
