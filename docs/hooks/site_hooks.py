"""What mkdocs calls: adds the pages that are made from the code, refuses what loads elsewhere."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import commands
import configurables
import gin_files
import http_api
import packages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REFERENCE = "reference"
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
NOT_LOADED = ("canonical", "next", "prev")  # what a <link> may point to without loading it


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The packages' pages stand in the navigation below Reference."""
    (reference,) = [entry[name] for entry in config.nav for name in entry if name == "Reference"]
    pages = ["packages/index.md", *(f"packages/{name}.md" for name in packages.names())]
    reference.append({"Packages": [f"{REFERENCE}/{page}" for page in pages]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code."""
    made = {
        "configurables.md": configurables.page(configurables.configurables()),
        "commands.md": commands.page(),
        "gin_files.md": gin_files.page(),
        "http_api.md": http_api.page(),
        "packages/index.md": packages.overview(),
        **{f"packages/{name}.md": packages.page(name) for name in packages.names()},
    }
    for name, content in made.items():
        files.append(File.generated(config, f"{REFERENCE}/{name}", content=content))
    return files


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would load something from another host."""
    found = _Loaded()
    found.feed(output)
    for address in found.addresses:
        if re.match(r"(?:https?:)?//", address):
            raise PluginError(f"{page.file.src_uri} loads {address} from another host")
    return output


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a style sheet that would."""
    for path in Path(config.site_dir).rglob("*.css"):
        for address in _of_style(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path} loads {address} from another host")


def _of_style(text: str) -> Iterator[str]:
    yield from re.findall(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""", text)


class _Loaded(HTMLParser):
    """Collects the addresses that a browser loads with a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        address = found.get(LOADING.get(tag, ""))
        if address and found.get("rel") not in NOT_LOADED:
            self.addresses.append(address)
