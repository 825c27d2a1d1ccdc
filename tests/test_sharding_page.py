"""The page about sharding says what the rules do, and its picture is the one they give."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def picture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("picture", DOCS / "sharding_picture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["picture"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(picture: ModuleType) -> Any:
    return picture.arrays()


@pytest.mark.slow
def test_the_table_of_the_page_is_that_of_the_rules(picture: ModuleType, found: Any) -> None:
    assert picture.table(found) in (DOCS / "sharding.md").read_text()


@pytest.mark.slow
def test_the_picture_of_the_page_is_what_is_drawn_now(
    picture: ModuleType, found: Any, tmp_path: Path
) -> None:
    committed = picture.PICTURE.read_text()
    version = importlib.metadata.version("matplotlib")
    if f"Matplotlib v{version}," not in committed:
        pytest.skip(f"drawn by another Matplotlib than {version}, whose texts may lie otherwise")
    picture.draw(found, tmp_path / "sharding.svg")
    drawn = (tmp_path / "sharding.svg").read_text()
    # `is`: for a difference between two long texts pytest would look for minutes.
    assert (drawn == committed) is True, "draw it again: python docs/sharding_picture.py"
