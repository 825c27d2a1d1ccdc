"""Broken inputs that once ended in a traceback, in a hang or in a result: one of each kind.

`test_mutations.py` tries a thousand others of these kinds.
"""

import contextlib
import gzip
import hashlib
import io
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gin
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from atlas_jax import ask, convert, import_index, prepare, remove_leaks, retrieve
from atlas_jax.build_index import main as build_index_main
from tests.hostile import commands, sound
from tests.hostile.commands import Bench
from tests.interop.test_torch_files import archive, tensor_program

RunMain = Callable[[list[str]], int]
Made = tuple[RunMain, list[str], str]  # the command, its arguments and what its message has to say


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    sound.build(folder)
    return folder


@pytest.fixture
def bench(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(random.Random(0), whole, tmp_path)


def refused(main: RunMain, argv: list[str], message: str, work: Path) -> None:
    before = {path for path in work.rglob("*") if not path.is_dir()}
    gin.clear_config()
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main(argv)
    told = [line for line in err.getvalue().splitlines() if ": error: " in line]
    assert code == 2 and len(told) == 1, err.getvalue()
    assert message in told[0]
    assert {path for path in work.rglob("*") if not path.is_dir()} == before


def model_with(bench: Bench, **changes: Any) -> list[str]:
    """convert of a model folder whose config.json says something else at dotted places."""
    path = bench.take("model") / "config.json"
    config = json.loads(path.read_text())
    for place, value in changes.items():
        *parents, last = place.split("__")
        holder = config
        for parent in parents:
            holder = holder[parent]
        holder[last] = value
    path.write_text(json.dumps(config))
    return commands._convert(bench, "atlas-jax", "hf", path.parent)


HUGE = 10**12
CONFIGS = [
    ({"models__retriever__layer_norm_eps": -1.0}, "config.json: models.retriever.layer_norm_eps"),
    ({"models__retriever__num_layers": HUGE}, "models.retriever.num_layers = 1000000000000"),
    ({"models__retriever__num_layers": 7}, "num_layers = 7, but the file holds 1 layers"),
    ({"models__reader": None}, "config.json: models.reader: expected an object, got null"),
    ({"models": []}, "config.json: models: expected an object, got a list"),
    ({"models__reader__vocab_size": "16"}, "models.reader.vocab_size = '16': expected a whole"),
    ({"models__reader__emb_dim": HUGE}, "models.reader.emb_dim = 1000000000000: expected a whole"),
    ({"sha256": 1}, "config.json: sha256: expected an object"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS)
def test_config_of_a_model_folder(bench: Bench, changes: dict[str, Any], message: str) -> None:
    refused(convert.main, model_with(bench, **changes), message, bench.work)


def _sums(folder: Path, name: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(config))


def test_weights_that_are_not_finite(bench: Bench) -> None:
    folder = bench.take("model")
    weights = load_file(folder / "retriever.safetensors")
    weights["encoder/layers_0/output/kernel"][1, 2] = np.nan
    save_file(weights, folder / "retriever.safetensors")
    _sums(folder, "retriever.safetensors")
    message = "retriever.safetensors: encoder/layers_0/output/kernel: the number at [1, 2] is not"
    argv = commands._retrieve(bench, INITIAL_CHECKPOINT_PATH=folder)
    refused(retrieve.main, argv, message, bench.work)
    refused(convert.main, commands._convert(bench, "atlas-jax", "hf", folder), message, bench.work)


def test_a_safetensors_header_that_is_broken(bench: Bench) -> None:
    folder = bench.take("model")
    path = folder / "retriever.safetensors"
    raw = path.read_bytes().replace(b'"data_offsets":[', b'"data_offsets":["', 1)
    path.write_bytes(raw)
    _sums(folder, path.name)
    argv = commands._retrieve(bench, INITIAL_CHECKPOINT_PATH=folder)
    refused(retrieve.main, argv, "retriever.safetensors: not a whole safetensors", bench.work)


def test_a_tokenizer_on_which_the_library_panics(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = bench.take("model")
    path = folder / "reader_tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    path.write_text(json.dumps(content))
    _sums(folder, path.name)
    argv = commands._convert(bench, "atlas-jax", "hf", folder)
    refused(convert.main, argv, f"{path}: the library breaks down", bench.work)
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("feed_forward_proj", ["relu"], "config.json: feed_forward_proj: expected a text, got a"),
        ("num_layers", HUGE, "config.json: num_layers: expected a whole number <= 512"),
        ("d_model", "8", "config.json: d_model: expected a whole number, got a text"),
        ("vocab_size", None, "config.json: vocab_size: expected a whole number, got null"),
    ],
)
def test_config_of_hugging_face(bench: Bench, field: str, value: Any, message: str) -> None:
    path = bench.take("hf") / "reader" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    argv = commands._convert(bench, "hf", "atlas-jax", path.parent)
    refused(convert.main, argv, message, bench.work)


def _manifest(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reader": []}, "manifest.json: reader: expected an object, got a list"),
        ({"count": "16"}, "manifest.json: count: expected a whole number, got a text"),
        ({"format": [1]}, "manifest.json: store format [1], this version reads 1 and 2"),
    ],
)
def test_manifest_of_a_store(bench: Bench, changes: dict[str, Any], message: str) -> None:
    folder = bench.take("store")
    _manifest(folder, "manifest.json", **changes)
    refused(retrieve.main, commands._retrieve(bench, STORE=folder), message, bench.work)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dtype": "float8"},
            "index.json: dtype is 'float8'; an index has float32, bfloat16, int8",
        ),
        ({"width": None}, "index.json: width: expected a whole number, got null"),
        ({"embeddings": "../../x.npy"}, "index.json: embeddings: expected a text matching"),
        ({"count": 3}, "index.json: 3 passages, but the store"),
        ({"version": 2**31}, "index.json: version: expected a whole number <= 2147483647"),
        ({"version": 2**63}, "index.json: version: expected a whole number <= 2147483647"),
    ],
)
def test_manifest_of_an_index(bench: Bench, changes: dict[str, Any], message: str) -> None:
    folder = bench.take("index")
    _manifest(folder, "index.json", **changes)
    refused(retrieve.main, commands._retrieve(bench, INDEX=folder), message, bench.work)


def test_a_manifest_with_nothing_but_its_format(bench: Bench) -> None:
    folder = bench.take("index")
    (folder / "index.json").write_text('{"format": 1}')
    argv = commands._retrieve(bench, INDEX=folder)
    refused(retrieve.main, argv, "index.json: the field ", bench.work)


def _row_without_title(raw: bytes) -> bytes:
    return raw.replace(b'"title"', b'"tutle"')


def _array(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[bytes], bytes]:
    def changed(raw: bytes) -> bytes:
        out = io.BytesIO()
        np.save(out, change(np.load(io.BytesIO(raw))))
        return out.getvalue()

    return changed


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("id_hashes.npy", lambda raw: b"", "id_hashes.npy is missing or not as"),
        ("reader_tokens.npy", _array(lambda a: a.astype(">u2")), "holds >u2 [16, 48] instead of"),
        ("retriever_tokens.npy", _array(lambda a: a.astype("f8")), "holds <f8 [16, 48] instead"),
        ("offsets.npy", _array(lambda a: np.r_[a[:3], a[2], a[4:]]), "it does not ascend from 0"),
        ("id_rows.npy", _array(lambda a: a + 7), "it has other rows than 0 to 15"),
        ("retriever_tokens.npy", _array(lambda a: a * 0 + 9999), "row 0 has other token ids than"),
    ],
)
def test_arrays_of_a_store(
    bench: Bench, name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    path = bench.take("flat") / name  # of format 1
    path.write_bytes(change(path.read_bytes()))
    argv = commands._retrieve(bench, STORE=path.parent, INDEX=bench.sound / "flat_index")
    if "token ids" in message:  # seen when the tokens go to the devices
        argv += ["--gin.RetrieveConfig.rerank=4"]
    refused(retrieve.main, argv, message, bench.work)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("offsets/zarr.json", lambda raw: raw.replace(b"uint64", b"int32"), "instead of uint64"),
        ("offsets/zarr.json", lambda raw: raw.replace(b"little", b"big"), "it is compressed, or"),
        ("offsets/c/0/0", lambda raw: raw[:8] + raw[:8] + raw[16:], "it does not ascend from 0"),
        ("reader/c/0", lambda raw: raw[:-2], "reader/c/0: it has "),
        ("reader/c/0", lambda raw: b"\xff" * len(raw), "row 0 has other token ids than"),
    ],
)
def test_arrays_of_a_shard(
    bench: Bench, name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    folder = bench.take("store")
    path = folder / "shards" / "00000-00000" / name
    path.write_bytes(change(path.read_bytes()))
    refused(retrieve.main, commands._retrieve(bench, STORE=folder), message, bench.work)


@pytest.mark.slow
def test_a_passage_of_a_store_without_its_title(bench: Bench) -> None:
    folder = bench.take("store")
    path = folder / "shards" / "00000-00000" / "text.jsonl"
    path.write_bytes(_row_without_title(path.read_bytes()))
    argv = commands._retrieve(bench, STORE=folder)
    refused(retrieve.main, argv, "text.jsonl: row ", bench.work)


@pytest.mark.parametrize("name", ["index", "index8", "flat_index"])
def test_an_index_that_is_not_finite(bench: Bench, name: str) -> None:
    folder = bench.take(name)
    if name == "flat_index":
        path = next(folder.glob("*.npy"))
        array = np.load(path)
        array[3] = np.nan
        np.save(path, array)
        named, store = path.name, bench.sound / "flat"
    else:
        named, store = "scales" if name == "index8" else "rows", bench.sound / "store"
        path = next(one for one in folder.glob(f"*/{named}/c/**/0") if one.is_file())
        array = np.frombuffer(path.read_bytes(), np.float32).reshape(16, -1).copy()
        array[3] = np.nan
        path.write_bytes(array.tobytes())
    argv = commands._retrieve(bench, INDEX=folder, STORE=store)
    refused(retrieve.main, argv, f"{named}: row 3 is not finite", bench.work)


SETTINGS = [
    ("BATCH_SIZE=9223372036854775808", "BATCH_SIZE: a number of 64 bits"),
    ("BATCH_SIZE=2147483647", "batch_size = 2147483647: expected a whole number from 1 to"),
    ("K=0", "k = 0: expected a whole number from 1 to"),
    ("GenerationConfig.length_penalty=1e999", "GenerationConfig.length_penalty: inf"),
    ("GenerationConfig.length_penalty=-1000.0", "length_penalty = -1000.0: expected a finite"),
    ("OptimizerConfig.learning_rate=-0.1", "learning_rate = -0.1: expected a finite number, 0"),
    ("StepConfig.reader_length=9223372036854775807", "StepConfig.reader_length"),
    ("ReaderConfig.emb_dim=1000000000000", "ReaderConfig.emb_dim = 1000000000000: expected"),
    ("QATask.query_format='{question!z}'", "QATask.query_format"),
    ("QATask.query_format='{question:100000000}'", "QATask.query_format"),
    ("StoreConfig.reader_format='{text!r}'", "StoreConfig.reader_format"),
    ("OUTPUT='a\\x00b'", "OUTPUT: 'a\\x00b' holds a null byte"),
]


@pytest.mark.parametrize(("binding", "message"), SETTINGS)
def test_settings(bench: Bench, binding: str, message: str) -> None:
    argv = commands._retrieve(bench, f"--gin.{binding}")
    if binding.startswith("StoreConfig"):
        argv = commands._retrieve(bench, f"--gin.{binding}", STORE=bench.work / "none")
    refused(retrieve.main, argv, message, bench.work)


def test_embedding_batches_beyond_any_corpus(bench: Bench) -> None:
    out = bench.work / "out"
    argv = [
        "--gin_file=runs/build_index.gin", f"--gin.INITIAL_CHECKPOINT_PATH={bench.sound / 'model'}",
        f"--gin.PASSAGES={bench.sound / 'passages.jsonl'}", f"--gin.STORE={out / 'store'}",
        f"--gin.INDEX={out / 'index'}", f"--gin.EMBED_BATCH_SIZE={10**30}",
    ]  # fmt: skip
    refused(build_index_main, argv, "EMBED_BATCH_SIZE: a number of 100 bits", bench.work)


def _line(text: str) -> Callable[[bytes], bytes]:
    def changed(raw: bytes) -> bytes:
        lines = raw.splitlines()
        lines[2] = text.encode("latin-1")
        return b"\n".join(lines) + b"\n"

    return changed


QUESTION = '{"question": "who?", "answers": ["a"], %s}'
LINES = [
    ("passages.jsonl", _line('{"id": "1", "text": ' + "[" * 5000 + "]" * 5000 + "}"), "too deep"),
    ("passages.jsonl", _line('{"id": ' + "1" * 5000 + ', "text": "a"}'), "out of range"),
    ("passages.jsonl", _line('{"id": "1", "text": "caf\xe9"}'), "not UTF-8 at byte 25 (0xe9)"),
    ("test.jsonl", _line(QUESTION % '"gold": [null]'), "field 'gold' holds None; an id is a text"),
    ("test.jsonl", _line(QUESTION % '"gold": [""]'), "field 'gold' holds ''; an id is a text"),
    (
        "test.jsonl",
        _line(QUESTION % '"qrels": {"p": Infinity}'),
        "qrels.p: inf is no number of JSON",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), LINES)
def test_lines_of_data(
    bench: Bench, name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    path = bench.take(name)
    path.write_bytes(change(path.read_bytes()))
    given = {"files" if name == "test.jsonl" else "passages": path}
    argv = commands._leaks(bench, **given)
    refused(remove_leaks.main, argv, f"{path}:3: ", bench.work)
    refused(remove_leaks.main, argv, message, bench.work)


def test_a_gzip_file_damaged_in_the_middle(bench: Bench) -> None:
    path = bench.work / "p.jsonl.gz"
    raw = bytearray(gzip.compress((bench.sound / "passages.jsonl").read_bytes() * 50))
    raw[len(raw) // 2 : len(raw) // 2 + 8] = b"\xff" * 8
    path.write_bytes(bytes(raw))
    argv = commands._leaks(bench, passages=path)
    refused(remove_leaks.main, argv, "p.jsonl.gz:", bench.work)


def test_a_published_file_that_is_not_utf8(bench: Bench) -> None:
    folder = bench.take("squad")
    path = folder / "train-v1.1.json"
    path.write_bytes(path.read_bytes().replace(b"Arvo", b"Arv\xe9"))
    argv = ["squad", f"--source={folder}", f"--out={bench.work / 'out'}", "--sample"]
    refused(prepare.main, argv, "train-v1.1.json: not UTF-8 (the byte 0xe9)", bench.work)


def test_a_question_that_is_not_utf8(bench: Bench) -> None:
    argv = [*commands._retrieve(bench), "a\udcffb"]
    refused(ask.main, argv, "holds the byte 0xff, which is not UTF-8", bench.work)


def test_outputs_below_a_file(bench: Bench) -> None:
    (bench.work / "file").write_text("")
    flags = {"from": "atlas-jax", "to": "hf", "input": bench.sound / "model", "output": "file/new"}
    argv = [f"--{name}={value}" for name, value in flags.items()]
    refused(convert.main, argv, "--output = 'file/new': lies below", bench.work)


def test_shards_of_which_two_passages_have_one_id(bench: Bench) -> None:
    folder = bench.take("shards")
    records = pickle.loads((folder / "passages.0.pt").read_bytes())
    records[5]["id"] = records[2]["id"]
    (folder / "passages.0.pt").write_bytes(pickle.dumps(records, 2))
    n = len(records)
    alone = b"\x80\x02" + tensor_program(8 * n, 0, (8, n), (n, 1))[9:-2] + b"."
    archive(folder / "embeddings.0.pt", alone, **{"0": np.ones(8 * n, np.float32).tobytes()})
    out, model = bench.work / "out", bench.sound / "model"
    argv = [
        f"--shards={folder}", "--check=0", f"--gin.ModelConfig.reader='{model}'",
        f"--gin.ModelConfig.retriever='{model}'", f"--gin.CorpusConfig.passages={out / 'p.jsonl'}",
        f"--gin.CorpusConfig.store={out / 'store'}", f"--gin.CorpusConfig.index={out / 'index'}",
    ]  # fmt: skip
    message = "passages.0.pt: passage 5 has the id 'p1', and so has"
    refused(import_index.main, argv, message, bench.work)
