"""The passage store: content, look-ups, bad input, and nothing half-written."""

import gzip
import json
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as tokenizers_library

from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.search import SearchResult
from atlas_jax.index.store_files import StoreConfig

CONFIG = StoreConfig(reader_length=40, retriever_length=24)


@pytest.fixture(scope="session")
def tokenizers(reader_tokenizer_file, retriever_tokenizer_file):
    return Tokenizer.from_file(reader_tokenizer_file), Tokenizer.from_file(retriever_tokenizer_file)


@pytest.fixture
def build(tmp_path, tokenizers):
    def build(source, name="store", config=CONFIG):
        return PassageStore.build(source, tmp_path / name, *tokenizers, config, progress=False)

    return build


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def passages(count, **extra):
    return [
        {"id": f"p{i}", "title": f"Title {i}", "text": f"Text number {i}.", **extra}
        for i in range(count)
    ]


def test_store_holds_texts_and_tokens(build, passages_file, tokenizers):
    store = build(passages_file)
    reader, retriever = tokenizers
    records = [json.loads(line) for line in passages_file.read_text().splitlines()]
    assert store.count == len(records)
    for row, record in enumerate(records):
        assert store.passage(row) == {**record, "section": ""}
        assert store.row_of(record["id"]) == row
        text = f"title: {record['title']} context: {record['text']}"
        want = reader.encode(text, add_special=False)[:40]
        np.testing.assert_array_equal(store.reader_tokens_nl[row], want + [0] * (40 - len(want)))
        ids = store.retriever_tokens_nm[row]
        ids = ids[ids != 0]
        assert ids[0] == retriever.cls_id and ids[-1] == retriever.eos_id  # also where it is cut
    assert store.reader_tokens_nl.dtype == np.uint16
    assert not isinstance(store.reader_tokens_nl, np.ndarray)  # read when it is asked for
    with pytest.raises(UserError, match="no passage with the id 'nobody'"):
        store.row_of("nobody")
    with pytest.raises(IndexError):
        store.passage(-1)


def test_sections_unicode_and_numeric_ids(build, tmp_path):
    record = {"id": 7, "title": "Žluť", "section": "Déjà vu", "text": "a\u2028b\nc \U0001f600"}
    config = StoreConfig(reader_format="{section}: {text}", reader_length=40)
    store = build(write(tmp_path / "p.jsonl", [record]), config=config)
    assert store.passage(store.row_of("7")) == {**record, "id": "7"}


def test_gzip_gives_the_same_store(build, passages_file, tmp_path):
    packed = tmp_path / "p.jsonl.gz"
    packed.write_bytes(gzip.compress(passages_file.read_bytes()))
    assert build(packed, "a").content_hash == build(passages_file, "b").content_hash


def test_hashes_tell_what_changed(build, passages_file, tmp_path):
    store = build(passages_file, "a")
    other_reader = build(passages_file, "b", StoreConfig(reader_length=30, retriever_length=24))
    assert other_reader.content_hash != store.content_hash
    assert other_reader.retriever_hash == store.retriever_hash
    other_retriever = build(passages_file, "c", StoreConfig(reader_length=40, retriever_length=20))
    assert other_retriever.retriever_hash != store.retriever_hash
    other_corpus = build(write(tmp_path / "p.jsonl", passages(6)), "d")
    assert other_corpus.retriever_hash != store.retriever_hash


def test_building_again_opens_the_same_and_refuses_another(build, passages_file, tmp_path):
    store = build(passages_file)
    before = (store.directory / "manifest.json").stat().st_mtime_ns
    assert build(passages_file).content_hash == store.content_hash
    assert (store.directory / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another store"):
        build(write(tmp_path / "other.jsonl", passages(3)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        build(passages_file, "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no passages"),
        (b"\n\n", "holds no passages"),
        (b'{"id": "a", "title": "t", "text": "x"}\n{"id": "b", "ti', "p.jsonl:2: cut off"),
        (b'{"id": "a", "title": "t"}\n', "p.jsonl:1: field 'text' is missing"),
        (b'{"id": "a", "title": 3, "text": "x"}\n', "p.jsonl:1: field 'title' must be a string"),
        (b'{"id": "a", "title": "t", "text": " "}\n', "p.jsonl:1: field 'text' is empty"),
        (b'{"id": "a", "title": "t", "text": "\xff"}\n', "p.jsonl:1: not UTF-8"),
        (b'{"id": "a", "title": "t", "text": "\\ud800"}\n', "p.jsonl:1: .* is half a character"),
        (
            b'{"id": "b", "title": "t", "text": "x"}\n{"id": "a", "title": "t", "text": "x"}\n\n'
            b'{"id": "a", "title": "t", "text": "y"}\n',
            r"duplicate passage id 'a': \S*p.jsonl:2 and \S*p.jsonl:4",
        ),
    ],
)
def test_bad_corpus_names_file_and_line(build, tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        build(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.jsonl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reader_format": "{titel}"}, "StoreConfig.reader_format = '{titel}'"),
        ({"retriever_format": "text"}, "StoreConfig.retriever_format = 'text'"),
        ({"retriever_format": "{text"}, "StoreConfig.retriever_format"),
        ({"retriever_format": ("{title}", "{titel}")}, "StoreConfig.retriever_format = '{titel}'"),
        ({"retriever_format": ()}, r"StoreConfig.retriever_format = \(\)"),
        ({"reader_length": 0}, "StoreConfig.reader_length"),
    ],
)
def test_bad_config_names_the_binding(settings, message):
    with pytest.raises(UserError, match=message):
        StoreConfig(**settings)


def test_a_passage_takes_the_first_format_whose_fields_it_has(tmp_path, tokenizers):
    formats = ("{title}: {section}", "{title}: {text}", "{text}")
    config = StoreConfig(retriever_format=formats)
    rest = {"title": "", "section": "", "text": "x"}
    assert config.text("retriever", {**rest, "title": "Arvo", "section": "Land"}) == "Arvo: Land"
    assert config.text("retriever", {**rest, "title": "Arvo"}) == "Arvo: x"
    assert config.text("retriever", rest) == "x"
    assert config.text("reader", rest) == "title:  context: x"
    path = write(tmp_path / "p.jsonl", [{"id": 1, "text": "x"}])
    store = PassageStore.build(path, tmp_path / "store", *tokenizers, config, progress=False)
    assert store.config == PassageStore.open(store.directory).config == config.fitted()
    again = PassageStore.build(path, tmp_path / "store", *tokenizers, config, progress=False)
    assert again.content_hash == store.content_hash


def test_passages_that_are_too_long_are_cut_and_told(tmp_path, tokenizers, capsys):
    texts = ["z", "z" * 9, "z" * 10]  # a byte is a token here
    path = write(tmp_path / "p.jsonl", [{"id": n, "text": t} for n, t in enumerate(texts)])
    config = StoreConfig(
        reader_format="{text}", retriever_format="{text}", reader_length=9, retriever_length=64
    )
    store = PassageStore.build(path, tmp_path / "store", *tokenizers, config, progress=False)
    told = "the reader sees the first 9 tokens (StoreConfig.reader_length) of 1 of 3 passages"
    assert capsys.readouterr().err.count(told) == 1
    assert [int((row != 0).sum()) for row in store.reader_tokens_nl] == [1, 9, 9]


def test_other_tokenizers_are_refused(build, passages_file, tokenizers):
    store = build(passages_file)
    reader, retriever = tokenizers
    PassageStore.open(store.directory, reader, retriever)
    with pytest.raises(UserError, match=f"reader tokenizer {reader.content_hash[:12]}.*has"):
        PassageStore.open(store.directory, reader_tokenizer=retriever)
    with pytest.raises(UserError, match="retriever tokenizer"):
        PassageStore.open(store.directory, retriever_tokenizer=reader)


def test_token_ids_above_the_vocabulary_are_refused(build, passages_file, tokenizers):
    store = build(passages_file)
    reader, retriever = tokenizers
    store.check_vocab(reader=reader.vocab_size, retriever=retriever.vocab_size)
    greatest = int(np.max(store.reader_tokens_nl))
    with pytest.raises(UserError, match=f"reader token id {greatest}.* {greatest} ids"):
        store.check_vocab(reader=greatest, retriever=1000)
    with pytest.raises(UserError, match="retriever token id"):
        store.check_vocab(retriever=int(np.max(store.retriever_tokens_nm)))


def test_missing_damaged_and_foreign_stores_are_refused(build, passages_file, tmp_path):
    with pytest.raises(UserError, match="is no passage store"):
        PassageStore.open(tmp_path / "nowhere")
    store = build(passages_file)
    manifest = store.directory / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format": 2', '"format": 99'))
    with pytest.raises(UserError, match="store format 99"):
        PassageStore.open(store.directory)
    manifest.write_text(text)
    tokens = store.directory / "shards" / "00000-00000" / "reader" / "c" / "0"
    tokens.write_bytes(tokens.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"reader/c/0: it has \d+ bytes instead of \d+"):
        np.asarray(PassageStore.open(store.directory).reader_tokens_nl)
    text_file = store.directory / "shards" / "00000-00000" / "text.jsonl"
    text_file.write_bytes(text_file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"text.jsonl: it has .*build it anew"):
        PassageStore.open(store.directory).passage(0)


def test_gather_passages_on_the_host(build, passages_file):
    store = build(passages_file)
    rows_bk = np.array([[3, -1], [0, 5]], np.int32)
    got = store.gather_passages(SearchResult(rows_bk=rows_bk, scores_bk=np.zeros((2, 2))))
    assert got.reader_tokens_bkl.dtype == np.int32
    np.testing.assert_array_equal(got.reader_tokens_bkl[1, 1], store.reader_tokens_nl[5])
    np.testing.assert_array_equal(got.retriever_tokens_bkm[0, 0], store.retriever_tokens_nm[3])
    assert not got.reader_tokens_bkl[0, 1].any() and not got.mask_bk[0, 1]


@pytest.mark.parametrize("limit", [2_000, 30_000, 60_000])
def test_a_full_disk_leaves_nothing(build, tmp_path, limit):
    """Files may not grow past `limit` bytes, which fails as a full disk does."""
    source = write(tmp_path / "p.jsonl", passages(1000))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(UserError, match="store could not be written, nothing of it was kept"):
            build(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.jsonl"]
    assert build(source).count == 1000


def test_a_kill_while_building_leaves_no_store(
    build, tmp_path, reader_tokenizer_file, retriever_tokenizer_file
):
    source = write(tmp_path / "p.jsonl", passages(50))
    script = f"""
import os, signal
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index import passages, shard_writer
token_ids = shard_writer.token_ids
def killed(records, tower, *args):
    if tower == "retriever":
        os.kill(os.getpid(), signal.SIGKILL)
    return token_ids(records, tower, *args)
shard_writer.token_ids = killed
passages.PassageStore.build({str(source)!r}, {str(tmp_path / "store")!r},
    Tokenizer.from_file({str(reader_tokenizer_file)!r}),
    Tokenizer.from_file({str(retriever_tokenizer_file)!r}), progress=False)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(UserError, match="is no passage store"):
        PassageStore.open(tmp_path / "store")
    assert build(source).count == 50
    left = sorted(p.name for p in (tmp_path / "store").iterdir())
    assert left == ["ids", "manifest.json", "shards"]


STREAM_SCRIPT = """
import re, sys
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.store_build import Cut
from atlas_jax.index.store_files import StoreConfig
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
tokenizers = [Tokenizer.from_file(name) for name in sys.argv[1:3]]
config = StoreConfig(reader_length=8, retriever_length=8)
settings = dict(config=config, progress=False, cut=Cut(part_bytes=1 << 18, workers=1))
PassageStore.build(sys.argv[3], sys.argv[3] + ".store", *tokenizers, **settings)
before = peak()
PassageStore.build(sys.argv[4], sys.argv[4] + ".store", *tokenizers, **settings)
print(peak() - before)
"""


@pytest.mark.slow
def test_building_streams(tmp_path, reader_tokenizer_file, retriever_tokenizer_file):
    """Twenty times the corpus, 40 MB more in 160 parts, takes hardly more memory."""
    few = write(tmp_path / "few.jsonl", passages(1000, section="s" * 2000))
    many = write(tmp_path / "many.jsonl", passages(20_000, section="s" * 2000))
    done = subprocess.run(
        [sys.executable, "-c", STREAM_SCRIPT, reader_tokenizer_file, retriever_tokenizer_file]
        + [few, many],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < many.stat().st_size / 3


def test_a_folder_of_files_becomes_one_store(build, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    write(folder / "a.jsonl", passages(2))
    (folder / "b.md").write_text("# Tolm\n\nTolm is a town.\n")
    store = build(folder)
    assert [store.passage(row)["id"] for row in range(3)] == ["p0", "p1", "b.md#0"]
    assert build(f"{folder}/*").content_hash == store.content_hash  # found there
    write(folder / "c.jsonl", passages(1))
    with pytest.raises(UserError, match=r"a\.jsonl:1 and .*c\.jsonl:1"):
        build(folder, "other")


def test_the_id_0_is_an_id_like_any_other(build, tmp_path):
    rows = [{"id": i, "title": "", "text": "a"} for i in range(2)]
    store = build(write(tmp_path / "p.jsonl", rows))
    assert [store.row_of("0"), store.row_of("1")] == [0, 1]


def latin_tokenizer() -> Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    backend = tokenizers_library.Tokenizer(tokenizers_library.models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = tokenizers_library.pre_tokenizers.Metaspace("▁")
    return Tokenizer(backend.to_str())


def test_a_script_that_the_tokenizer_lacks_is_told_or_refused(tmp_path, tokenizers, capsys):
    def attempt(texts):
        rows = [{"id": f"p{i}", "title": "", "text": text} for i, text in enumerate(texts)]
        source = write(tmp_path / "p.jsonl", rows)
        name = tmp_path / str(len(list(tmp_path.iterdir())))
        return PassageStore.build(
            source, name, latin_tokenizer(), tokenizers[1], CONFIG, progress=False
        )

    attempt(["Tolm is a town."])
    attempt(["Tolm is a town. " * 700 + "托尔姆是一座城市" * 5000])  # its beginning counts
    assert "does not know" not in capsys.readouterr().err
    attempt(["Tolm is a town.", "托尔姆是一座城市"])
    assert (
        "the reader's tokenizer does not know 50% of the characters of 2 passages looked at, and "
        "next to nothing of 1 of them (passage 'p1': '托尔姆是一座城市')"
    ) in capsys.readouterr().err
    with pytest.raises(UserError, match="take a model whose tokenizer has this script"):
        attempt(["Tolm.", "托尔姆是一座城市", "托尔姆"])
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
