"""Passage files and saved index shards of Meta's Atlas become corpus, store and index."""

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas_jax import convert, import_index
from atlas_jax.build_index import main as build_index_main
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import read_jsonl
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.saved import load_index
from atlas_jax.interop.atlas_corpus import IndexShards, read_passages
from tests.conftest import PASSAGES
from tests.interop import small
from tests.interop.test_torch_files import Evil, archive, tensor_program

CORPUS = [
    {**passage, "section": "History" if number % 2 else ""}
    for number, passage in enumerate(PASSAGES)
]


def half_program(count: int, shape: tuple[int, ...]) -> bytes:
    """A bare float16 tensor, as torch.save of an embedding shard has it."""
    program = tensor_program(count, 0, shape, (shape[1], 1)).replace(
        b"FloatStorage", b"HalfStorage"
    )
    # {'w': tensor} without the dict: no empty dict and key in front, no set-item behind.
    return b"\x80\x02" + program[len(b"\x80\x02}X\x01\x00\x00\x00w") : -2] + b"."


def write_shards(folder: Path, embeddings_ne: np.ndarray, cuts: list[int]) -> Path:
    folder.mkdir()
    start = 0
    for shard, end in enumerate(cuts):
        records = []
        for item in CORPUS[start:end]:  # as Atlas has them in memory: section in the title
            title = f"{item['title']}: {item['section']}" if item["section"] else item["title"]
            records.append({**item, "title": title})
        (folder / f"passages.{shard}.pt").write_bytes(pickle.dumps(records, 5))
        part = embeddings_ne[start:end].T.astype(np.float16)
        program = half_program(part.size, part.shape)
        archive(folder / f"embeddings.{shard}.pt", program, **{"0": part.tobytes()})
        start = end
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose retriever is the golden MiniLM-like one."""
    folder = tmp_path_factory.mktemp("model")
    flags = [f"--input={small.GOLDENS / 't5_v1_1'}", f"--input={small.GOLDENS / 'minilm'}"]
    flags += [f"--reader_tokenizer={small.reader_tokenizer(folder)}"]
    flags += [f"--retriever_tokenizer={small.wordpiece_file(folder)}"]
    flags += ["--allow_unused=pooler.*", f"--output={folder / 'ours'}"]
    assert convert.main(["--from=hf", "--to=atlas-jax", *flags]) == 0
    return folder / "ours"


def bindings(folder: Path, model: Path, name: str = "a") -> list[str]:
    values = {
        "ModelConfig.reader": model,
        "ModelConfig.retriever": model,
        "CorpusConfig.passages": folder / f"{name}.jsonl",
        "CorpusConfig.store": folder / f"{name}_store",
        "CorpusConfig.index": folder / f"{name}_index",
        "StoreConfig.retriever_length": 19,
        "StoreConfig.reader_length": 40,
    }
    return [f"--gin.{key}={value}" for key, value in values.items()] + [
        "--gin.CorpusConfig.embed_batch_size=8"
    ]


def embedded(folder: Path, model: Path) -> tuple[np.ndarray, PassageStore, str]:
    """The index that build_index itself makes of the same passages."""
    texts = folder / "text.jsonl"
    texts.write_text("".join(json.dumps(item) + "\n" for item in CORPUS))
    assert import_index.main([f"--corpus={texts}", *bindings(folder, model, "b")]) == 0
    assert build_index_main(bindings(folder, model, "b")) == 0
    store = PassageStore.open(folder / "b_store")
    manifest = json.loads((folder / "b_index" / "index.json").read_text())
    index = load_index(folder / "b_index", store, manifest["encoder_hash"])
    return np.asarray(index.embeddings_ne), store, manifest["encoder_hash"]


@pytest.mark.slow
def test_shards_become_the_index_that_build_index_makes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, store, made_by = embedded(tmp_path, model)
    shards = write_shards(tmp_path / "saved", expected, [4, 6])
    assert import_index.main([f"--shards={shards}", "--check=5", *bindings(tmp_path, model)]) == 0
    output = capsys.readouterr().out
    assert "5 passages embedded anew: median cosine 1.0000" in output
    assert f"{tmp_path}/a_index: 6 passages" in output
    taken = PassageStore.open(tmp_path / "a_store")
    assert taken.content_hash == store.content_hash
    assert taken.passage(1)["title"] == f"{CORPUS[1]['title']}: History"
    index = load_index(tmp_path / "a_index", taken, made_by)
    np.testing.assert_array_equal(index.embeddings_ne, expected.astype(np.float16))
    # The index of another encoder: the same numbers in another order.
    other = write_shards(tmp_path / "other", np.ascontiguousarray(expected[:, ::-1]), [6])
    assert import_index.main([f"--shards={other}", *bindings(tmp_path, model, "c")]) == 2
    assert "was made by another encoder" in capsys.readouterr().err
    assert not list(tmp_path.glob("c*"))  # neither corpus nor store nor index


def test_text_and_infobox_files_become_one_corpus(tmp_path: Path) -> None:
    text, infobox = tmp_path / "text-list-100-sec.jsonl", tmp_path / "infobox.jsonl"
    text.write_text('{"id": "0", "title": "A", "section": "B", "text": "c", "more": 1}\n\n')
    infobox.write_text('{"id": 0, "title": "A", "text": "population: 3"}\n')
    assert list(read_passages([text, infobox], prefix_ids=True)) == [
        {"id": "text-list-100-sec/0", "title": "A: B", "section": "B", "text": "c"},
        {"id": "infobox/0", "title": "A", "section": "", "text": "population: 3"},
    ]
    assert [record["id"] for record in read_passages([text, infobox])] == ["0", "0"]
    infobox.write_text('{"id": 0, "title": 5, "text": "population: 3"}\n')
    with pytest.raises(UserError, match=r"infobox.jsonl:1: field 'title' must be a string"):
        list(read_passages([infobox]))


def test_broken_rows_of_a_corpus_are_skipped_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    infobox = tmp_path / "infobox.jsonl"
    infobox.write_text('{"id": 0, "text": "a"}\n{"id": 1}\n{"id": 2, "text": "b"}\n{"id": 3,\n')
    corpus = tmp_path / "corpus.jsonl"
    command = [f"--corpus={infobox}", f"--gin.CorpusConfig.passages={corpus}"]
    assert import_index.main(command) == 2
    assert "infobox.jsonl:2: field 'text' is missing" in capsys.readouterr().err
    assert not corpus.exists()
    assert import_index.main([*command, "--gin.RowsConfig.skip_broken=True"]) == 0
    assert [row["id"] for _, row in read_jsonl(corpus)] == ["0", "2"]
    told = capsys.readouterr().err
    assert "skipped: " in told and "infobox.jsonl:2: field 'text' is missing" in told
    assert f"skipped: 2 broken rows of {infobox} in all" in told


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        shards = IndexShards(folder)
        for shard in range(shards.count):
            shards.passages(shard)
            shards.embeddings(shard)
    return str(caught.value)


def test_broken_shards_are_named(tmp_path: Path) -> None:
    embeddings = np.arange(6 * 4, dtype=np.float32).reshape(6, 4)

    def fresh(name: str) -> Path:
        return write_shards(tmp_path / name, embeddings, [4, 6])

    assert "no saved index" in refused(tmp_path / "nothing")
    folder = fresh("a")
    (folder / "embeddings.0.pt").unlink()
    assert "embeddings.0.pt is missing" in refused(folder)
    folder = fresh("b")
    (folder / "passages.1.pt").write_bytes(pickle.dumps(CORPUS[4:5]))
    assert "passages.1.pt: 1 passages for 2 embeddings" in refused(folder)
    folder = fresh("c")
    (folder / "passages.1.pt").write_bytes(pickle.dumps([{"id": "1"}, {"id": "2"}]))
    assert "passages.1.pt: passage 0: field 'text' is missing" in refused(folder)
    folder = fresh("d")
    marker = tmp_path / "executed"
    (folder / "passages.0.pt").write_bytes(pickle.dumps([Evil(os.system, f"touch {marker}")] * 4))
    assert "passages.0.pt: refused: the pickle asks for posix.system" in refused(folder)
    assert not marker.exists()
    folder = fresh("e")
    raw = (folder / "passages.0.pt").read_bytes()
    (folder / "passages.0.pt").write_bytes(raw[:-30])
    assert "passages.0.pt: not a whole pickle" in refused(folder)
    folder = fresh("f")
    program = half_program(3 * 2, (3, 2))
    archive(folder / "embeddings.1.pt", program, **{"0": b"\0" * 12})
    assert "embeddings.1.pt: embeddings of 3 numbers, those of shard 0 have 4" in refused(folder)
    folder = fresh("g")
    program = half_program(4 * 2, (4, 2))
    broken = struct.pack("<8e", *range(7), float("nan"))
    archive(folder / "embeddings.1.pt", program, **{"0": broken})
    assert "embeddings.1.pt: the embedding of passage 1 is not finite" in refused(folder)


def test_what_is_needed_is_asked_for(tmp_path: Path, capsys: Any) -> None:
    assert import_index.main([]) == 2
    assert "give either --corpus" in capsys.readouterr().err
    assert import_index.main([f"--corpus={tmp_path / 'x'}"]) == 2
    assert "CorpusConfig.passages is not given" in capsys.readouterr().err
    assert import_index.main([f"--shards={tmp_path}"]) == 2
    assert "CorpusConfig.store is not given" in capsys.readouterr().err
