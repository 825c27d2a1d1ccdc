"""Files that git-lfs has not fetched, wherever a command meets them; and lengths beyond a model."""

from pathlib import Path
from typing import Any

import pytest

from atlas_jax import ask, convert, remove_leaks, retrieve
from atlas_jax.build_index import main as build_index_main
from tests.core.test_paths import POINTER
from tests.hostile import commands
from tests.hostile.commands import Bench
from tests.hostile.test_cases import bench, refused, whole

__all__ = ["bench", "whole"]  # fixtures


def _converted(source: str, folder: str, part: str = "") -> Any:
    def argv(bench: Bench) -> tuple[Any, list[str], Path]:
        given = bench.take(folder)
        return convert.main, commands._convert(bench, source, "hf", given / part), given / part

    return argv


def _pickled(bench: Bench) -> tuple[Any, list[str], Path]:
    given = bench.take("hf") / "reader"
    (given / "model.safetensors").rename(given / "pytorch_model.bin")
    return convert.main, commands._convert(bench, "hf", "atlas-jax", given), given


def _sentencepiece(bench: Bench) -> tuple[Any, list[str], Path]:
    path = bench.work / "spiece.model"
    path.write_bytes(b"x")
    argv = commands._convert(bench, "atlas-jax", "hf", bench.sound / "model")
    return convert.main, [*argv, "--part=reader", f"--reader_tokenizer={path}"], bench.work


def _searched(folder: str, name: str) -> Any:
    def argv(bench: Bench) -> tuple[Any, list[str], Path]:
        given = bench.take(folder)
        return retrieve.main, commands._retrieve(bench, **{name: given}), given

    return argv


def _data(bench: Bench) -> tuple[Any, list[str], Path]:
    path = bench.take("test.jsonl")
    return remove_leaks.main, commands._leaks(bench, files=path), path.parent


def _gin(bench: Bench) -> tuple[Any, list[str], Path]:
    path = bench.work / "x.gin"
    path.write_bytes(b"")
    return retrieve.main, [*commands._retrieve(bench), f"--gin_file={path}"], bench.work


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (_converted("hf", "hf", "reader"), ("config.json", "model.safetensors")),
        (_converted("hf", "hf", "retriever"), ("tokenizer.json", "modules.json")),
        (_converted("t5x", "t5x"), ("checkpoint_0/checkpoint", "checkpoint_0/target.*/.zarray")),
        (_converted("t5x", "t5x"), ("checkpoint_0/target.*/0*",)),
        (_converted("atlas-jax", "model"), ("config.json", "reader.safetensors")),
        (_pickled, ("pytorch_model.bin",)),
        (_sentencepiece, ("spiece.model",)),
        (_searched("store", "STORE"), ("manifest.json", "shards/*/offsets/zarr.json")),
        (_searched("store", "STORE"), ("shards/*/reader/c/0", "shards/*/text.jsonl")),
        (_searched("index", "INDEX"), ("index.json", "*/rows/zarr.json", "*/rows/c/0/0")),
        (_searched("model", "INITIAL_CHECKPOINT_PATH"), ("retriever_tokenizer.json",)),
        (_data, ("test.jsonl",)),
        (_gin, ("x.gin",)),
    ],
)
def test_pointers_of_git_lfs(bench: Bench, case: Any, names: tuple[str, ...]) -> None:
    main, argv, folder = case(bench)
    for name in names:
        path = sorted(folder.glob(name))[0]
        before = path.read_bytes()
        path.write_bytes(POINTER)
        refused(
            main, argv, f"{path.name} is a pointer of git-lfs, not the file: run `git", bench.work
        )
        path.write_bytes(before)


def _build(bench: Bench, *more: str) -> list[str]:
    out = bench.work / "out"
    flags = {
        "INITIAL_CHECKPOINT_PATH": bench.sound / "model",
        "PASSAGES": bench.sound / "passages.jsonl",
        "STORE": out / "store", "INDEX": out / "index", "EMBED_BATCH_SIZE": 8,
    }  # fmt: skip
    argv = [f"--gin.{name}={value}" for name, value in flags.items()]
    return ["--gin_file=runs/build_index.gin", *argv, *more]


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("StoreConfig.retriever_length=65", "bind StoreConfig.retriever_length to 64 or less"),
        ("DataConfig.retriever_query_length=65", "bind DataConfig.retriever_query_length to 64 or"),
    ],
)
def test_lengths_beyond_the_retriever(
    bench: Bench, binding: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = binding.partition("=")[0]
    refused(build_index_main, _build(bench, f"--gin.{binding}"), f"{name} = 65", bench.work)
    refused(build_index_main, _build(bench, f"--gin.{binding}"), message, bench.work)
    assert "read passages" not in capsys.readouterr().err  # nothing of the corpus was read
    argv = [*commands._retrieve(bench), f"--gin.{binding}"]
    refused(retrieve.main, argv, message, bench.work)
    asked = [f"--gin.{binding}", "who?", "--gin_file=runs/ask.gin"]
    sound = bench.sound
    asked += [f"--gin.INITIAL_CHECKPOINT_PATH={sound / 'model'}", f"--gin.STORE={sound / 'store'}"]
    refused(ask.main, asked, message, bench.work)


def test_the_run_files_fit_a_retriever_of_few_positions(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    import gin

    from atlas_jax.index.passages import PassageStore

    path = bench.work / "long.jsonl"
    path.write_text('{"id": "0", "text": "' + "words of a long passage " * 100 + '"}\n')
    gin.clear_config()
    assert build_index_main(_build(bench, f"--gin.PASSAGES={path}")) == 0
    err = capsys.readouterr().err
    assert "the retriever sees the first 64 tokens (StoreConfig.retriever_length) of 1 of 1" in err
    config = PassageStore.open(bench.work / "out" / "store").config
    assert (config.reader_length, config.retriever_length) == (192, 64)


@pytest.mark.parametrize("name", ["STORE", "INDEX"])
def test_places_that_cannot_be_written_are_told_before_the_corpus_is_read(
    bench: Bench, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (bench.work / "file").write_text("")
    argv = _build(bench, f"--gin.{name}={bench.work / 'file' / 'x'}")
    message = f"CorpusConfig.{name.lower()} = '{bench.work / 'file' / 'x'}': lies below"
    refused(build_index_main, argv, message, bench.work)
    assert "read passages" not in capsys.readouterr().err
