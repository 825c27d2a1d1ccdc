"""The site's pages that are made from the code, and its rule: nothing from another host."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from atlas_jax import cli
from atlas_jax.core.config import gin_folder

HOOKS = Path(__file__).parents[1] / "docs" / "hooks"


@pytest.fixture(scope="module")
def hook() -> Iterator[object]:
    """Imports a hook as mkdocs does, by its file's name."""
    sys.path.insert(0, str(HOOKS))
    yield importlib.import_module
    sys.path.remove(str(HOOKS))


@pytest.fixture(scope="module")
def found(hook) -> dict[str, object]:
    return {one.name: one for one in hook("configurables").configurables()}


def test_every_field_that_gin_may_bind_is_explained(found) -> None:
    silent = [f"{one.name}.{field.name}" for one in found.values() for field in one.fields
              if not field.words]  # fmt: skip
    assert found and silent == []


def test_a_field_has_its_type_default_and_words(found) -> None:
    fields = {field.name: field for field in found["TrainConfig"].fields}
    assert fields["model_dir"].default == "required"
    seed = {field.name: field for field in found["GenerationConfig"].fields}["seed"]
    assert (seed.type, seed.default) == ("int ≥ 0, ≤ 4294967295", "0")
    assert seed.words.startswith("from 0 to 2**32 - 1. A sampled answer depends on it")


def test_a_field_of_a_parent_has_the_parents_words(found) -> None:
    fields = {field.name: field for field in found["StepConfig"].fields}
    assert "passages" in fields["k"].words


def test_nothing_of_a_docstring_is_taken_for_html_or_for_a_column(hook) -> None:
    module = hook("configurables")
    assert module._cell("a <b> | `<c>` *d*") == r"a &lt;b> &#124; `<c>` \*d\*"


def test_the_http_api_has_every_route_and_field(hook) -> None:
    page = hook("http_api").page()
    assert "## POST /v1/answers\n" in page and "[AnswersReply](#answersreply)" in page
    assert "| `k` | integer ≥ 0 ≤ 1048576 | `0` | Passages for each question" in page


def test_every_command_shows_its_help(hook) -> None:
    page = hook("commands").page()
    for name in cli.COMMANDS:
        assert f"## {name}\n" in page
        assert f"usage: atlas-jax {name}" in page


def test_every_gin_file_is_on_its_page(hook) -> None:
    page = hook("gin_files").page()
    for path in gin_folder().rglob("*.gin"):
        assert f"### {path.relative_to(gin_folder())}\n" in page
    assert (
        "| Requires | MODEL_DIR, INITIAL_CHECKPOINT_PATH, TRAIN_FILE, STORE, TRAIN_STEPS |" in page
    )


@pytest.mark.parametrize(
    ("html", "refused"),
    [
        ('<script src="https://elsewhere.org/a.js"></script>', "https://elsewhere.org/a.js"),
        ('<link rel="stylesheet" href="//elsewhere.org/a.css">', "//elsewhere.org/a.css"),
        ('<img src="https://elsewhere.org/a.png">', "https://elsewhere.org/a.png"),
        ('<a href="https://elsewhere.org">a link is not loaded</a><img src="a.png">', ""),
    ],
)
def test_a_page_that_loads_from_another_host_is_refused(hook, html: str, refused: str) -> None:
    exceptions = pytest.importorskip("mkdocs.exceptions", reason="needs the extra [docs]")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    site: ModuleType = hook("site_hooks")
    if not refused:
        assert site.on_post_page(html, page, None) == html
        return
    with pytest.raises(exceptions.PluginError, match=f"page.md loads {refused} from another host"):
        site.on_post_page(html, page, None)
