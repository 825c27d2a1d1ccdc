"""The page about sharding says what the rules do."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
def test_the_table_of_the_page_is_that_of_the_rules(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("picture", DOCS / "sharding_picture.py")
    assert spec is not None and spec.loader is not None
    picture = importlib.util.module_from_spec(spec)
    __import__("sys").modules["picture"] = picture  # dataclasses look their module up
    spec.loader.exec_module(picture)
    found = picture.arrays()
    assert picture.table(found) in (DOCS / "sharding.md").read_text()
    picture.draw(found, tmp_path / "sharding.svg")
    assert "MLP in [embed, mlp]" in (DOCS / "sharding.md").read_text()
    assert (tmp_path / "sharding.svg").stat().st_size > 10_000
