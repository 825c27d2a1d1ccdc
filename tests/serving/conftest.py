"""One small model and one server for all tests of a module."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra [serve]")

from atlas_jax.answering.atlas import Atlas
from atlas_jax.serving.run import Server
from tests.serving.browsing import launched
from tests.serving.served import kept_store, load_atlas, serving


@pytest.fixture(scope="package")
def atlas(
    tmp_path_factory: pytest.TempPathFactory,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
) -> Atlas:
    folder = tmp_path_factory.mktemp("served")
    return load_atlas(folder, reader_tokenizer_file, retriever_tokenizer_file)


@pytest.fixture(scope="package")
def server(atlas: Atlas) -> Iterator[Server]:
    with serving(atlas) as running:
        yield running


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    with launched() as running:
        yield running


@pytest.fixture(scope="module")
def kept(
    tmp_path_factory: pytest.TempPathFactory,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
) -> Path:
    """A folder with a model, a store and its index, for tests that change them."""
    folder = tmp_path_factory.mktemp("kept")
    kept_store(folder, reader_tokenizer_file, retriever_tokenizer_file)
    return folder
