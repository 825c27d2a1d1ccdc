"""What is written to a bucket is found there; a bucket in memory stands for a real one."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import read_jsonl, write_jsonl
from atlas_jax.core.paths import as_path
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.models.folder import ModelPart, load_model, save_model
from atlas_jax.training.metrics import RunLog, read_metrics


class Bucket(MemoryFileSystem):
    """A bucket in memory."""

    protocol = ("gcs", "gs")
    store: dict = {}
    pseudo_dirs = [""]


@pytest.fixture(autouse=True)
def bucket() -> Iterator[None]:
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    fsspec.register_implementation("gs", Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield
    known = importlib.import_module("fsspec.registry")._registry
    known.pop("gcs"), known.pop("gs")
    backend.fsspec_backend._get_filesystem.cache_clear()
    Bucket.store.clear()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_come_back(name: str) -> None:
    rows = [{"id": str(i), "text": "é" * i} for i in range(3)]
    assert write_jsonl(f"gs://b/run/{name}", rows) == 3
    assert [row for _, row in read_jsonl(f"gs://b/run/{name}")] == rows
    with pytest.raises(ZeroDivisionError):
        write_jsonl(f"gs://b/run/{name}", ({"x": 1 // 0} for _ in range(2)))
    assert [row for _, row in read_jsonl(f"gs://b/run/{name}")] == rows
    with pytest.raises(UserError, match="gs://b/nothing: no such file"):
        list(read_jsonl("gs://b/nothing"))


def test_metrics_grow_and_go_on() -> None:
    directory = as_path("gs://b/run")
    with RunLog(directory, 0, 6) as log:
        for step in (2, 4, 6):
            log.write(step, "train", {"loss": step})
    with RunLog(directory, 4, 6) as log:
        log.write(6, "train", {"loss": 60})
    assert [row["train/loss"] for row in read_metrics(directory)] == [2, 4, 60]


def test_a_model_folder_comes_back(
    reader_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = ModelPart(
        {"d": 4}, {"w": np.ones(4, np.float32)}, Tokenizer.from_file(reader_tokenizer_file)
    )
    save_model("gs://b/run/final", {"reader": part}, about={"steps": 3})
    assert json.loads(as_path("gs://b/run/final/config.json").read_text())["about"] == {"steps": 3}
    found = load_model("gs://b/run/final")["reader"]
    np.testing.assert_array_equal(found.params["w"], part.params["w"])
    with pytest.raises(UserError, match="is not a model folder"):
        load_model("gs://b/nowhere")


def test_a_kind_of_bucket_that_is_not_installed_is_named() -> None:
    with pytest.raises(UserError, match="nope://x.*Protocol not known"):
        as_path("nope://x")
