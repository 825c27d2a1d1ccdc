"""What is written to a bucket is found there; a bucket in memory stands for a real one."""

import importlib
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from atlas_jax.core.errors import UserError
from atlas_jax.core.file_sets import passage_files
from atlas_jax.core.jsonl import read_jsonl, write_jsonl
from atlas_jax.core.paths import (
    as_path,
    check_fetched,
    check_folder_fetched,
    check_output_file,
    check_output_folder,
    input_file,
    read_text,
)
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


def test_a_pattern_stands_for_files_in_a_bucket() -> None:
    names = [f"gs://b/run/p-{number:05d}-of-00002.jsonl" for number in range(2)]
    for name in names:
        write_jsonl(name, [{"id": name, "text": "t"}])
    assert passage_files("gs://b/run/p-*.jsonl") == names
    assert passage_files([*names, "gs://b/run/p-*1-of*"]) == [*names, names[1]]
    with pytest.raises(UserError, match="no file has such a name"):
        passage_files("gs://b/run/q*")
    as_path(names[0]).unlink()
    with pytest.raises(UserError, match="p-00000-of-00002.jsonl is missing: the set of 2"):
        passage_files("gs://b/run/p-*.jsonl")


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
    save_model("gs://b/run/final", {"toy": part}, about={"steps": 3})
    assert json.loads(as_path("gs://b/run/final/config.json").read_text())["about"] == {"steps": 3}
    found = load_model("gs://b/run/final")["toy"]
    np.testing.assert_array_equal(found.params["w"], part.params["w"])
    with pytest.raises(UserError, match="is not a model folder"):
        load_model("gs://b/nowhere")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a\0b", "holds a null byte"),
        ("a\udcffb", "holds the byte 0xff, which is not UTF-8"),
        ("a\ud800b", r"holds half a character, '\\ud800'"),
        ("x" * 256, "is too long"),
        ("é" * 128, "is too long"),
        ("/".join(["x" * 200] * 21), "is too long"),
    ],
)
def test_what_no_file_can_be_called_is_refused(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_path(path)
    assert as_path("x" * 255) == Path("x" * 255)


def _of_every_kind(folder: Path) -> dict[str, Path]:
    found = {kind: folder / kind for kind in ("folder", "pipe", "socket", "device", "link")}
    found["folder"].mkdir()
    os.mkfifo(found["pipe"])
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(found["socket"]))
    try:
        os.mknod(found["device"], stat.S_IFCHR | 0o600, os.makedev(1, 3))  # a null device
    except PermissionError:
        del found["device"]
    found["link"].symlink_to("pipe")
    return found


def test_what_is_no_regular_file_is_neither_read_nor_replaced(tmp_path: Path) -> None:
    for kind, path in _of_every_kind(tmp_path).items():
        before = path.lstat().st_mode
        for refused in (check_output_file, input_file, lambda p: write_jsonl(p, [{"a": 1}])):
            with pytest.raises(UserError, match=f"is a {kind.replace('link', 'pipe')}"):
                refused(path)
        assert path.lstat().st_mode == before
        if kind != "folder":
            with pytest.raises(UserError, match="choose a folder"):
                check_output_folder(path)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_output_below_a_file_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for check in (check_output_file, check_output_folder):
        with pytest.raises(UserError, match=r"^--out = '.*file/new/x': lies below .*file, which"):
            check(tmp_path / "file" / "new" / "x", "--out")
        assert check(tmp_path / "new" / "x", "--out") == tmp_path / "new" / "x"
    assert check_output_file(tmp_path / "file") == tmp_path / "file"


def test_text_is_read_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfA = 1")
    assert read_text(tmp_path / "a") == "A = 1"
    (tmp_path / "a").write_bytes(b"A = \xe9")
    with pytest.raises(UserError, match=r"a: not UTF-8 at byte 5 \(0xe9\)"):
        read_text(tmp_path / "a")


def test_a_kind_of_bucket_that_is_not_installed_is_named() -> None:
    with pytest.raises(UserError, match="nope://x.*Protocol not known"):
        as_path("nope://x")


def test_outputs_without_permission_are_refused(tmp_path: Path, monkeypatch) -> None:
    mounted = tmp_path / "mounted"  # may be written into, unlike the folder that it lies in
    mounted.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    assert check_output_folder(mounted) == mounted
    for check in (check_output_file, check_output_folder):
        with pytest.raises(UserError, match=r"--out = .* no permission to write into"):
            check(tmp_path / "new", "--out")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="no permission to write into it"):
        check_output_folder(mounted)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5d3\nsize 990345061\n"


def test_a_pointer_of_git_lfs_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(POINTER)
    message = f"{path} is a pointer of git-lfs, not the file: run `git lfs pull` in its folder"
    for read in (input_file, check_fetched, lambda p: list(read_jsonl(p))):
        with pytest.raises(UserError, match=message):
            read(path)
    with pytest.raises(UserError, match=message):
        check_folder_fetched(tmp_path)
    path.write_bytes(POINTER + b"x" * 1024)  # longer than any pointer
    check_folder_fetched(tmp_path)


@pytest.mark.parametrize("path", ["a\0b", "x" * 300])
def test_what_an_output_cannot_be_called_is_told_with_its_binding(path: str) -> None:
    for check in (check_output_file, check_output_folder):
        with pytest.raises(UserError, match=r"^TrainConfig.model_dir: the path "):
            check(path, "TrainConfig.model_dir")
