"""A store in shards: how a corpus is cut, what survives a kill, old stores, buckets."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tensorstore

from atlas_jax.core import objects
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import STRICT, RowsConfig
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index import id_buckets, shard_pool
from atlas_jax.index.changes import Batch, change
from atlas_jax.index.living import LivingStore
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.store_build import Cut
from atlas_jax.index.store_files import StoreConfig
from tests.index.flat_store import write_flat

CONFIG = StoreConfig(reader_length=30, retriever_length=16)
SMALL = Cut(part_bytes=400, shard_rows=7, workers=1)  # bytes and rows of a shard
COUNT = 50


@pytest.fixture(scope="session")
def tokenizers(reader_tokenizer_file, retriever_tokenizer_file):
    return Tokenizer.from_file(reader_tokenizer_file), Tokenizer.from_file(retriever_tokenizer_file)


def builder(folder, tokenizers):
    """Builds stores below a folder, or at an address."""

    def build(source, name="store", cut=SMALL, rows=STRICT):
        place = name if "://" in name else folder / name
        return PassageStore.build(source, place, *tokenizers, CONFIG, rows, False, cut)

    return build


@pytest.fixture
def build(tmp_path, tokenizers):
    return builder(tmp_path, tokenizers)


def records(count=COUNT):
    rng = random.Random(0)
    return [
        {"id": f"p{i}", "title": f"Title {i}", "text": "word é " * rng.randint(1, 9)}
        for i in range(count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "p.jsonl", records())


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def same(one: PassageStore, other: PassageStore) -> None:
    assert one.count == other.count
    assert one.passages(range(one.count)) == other.passages(range(other.count))
    for name in ("reader_tokens_nl", "retriever_tokens_nm"):
        np.testing.assert_array_equal(np.asarray(getattr(one, name)), getattr(other, name))
    some = np.array([[3, 44], [7, 3]])
    np.testing.assert_array_equal(one.reader_tokens_nl[some], other.reader_tokens_nl[some])
    assert all(one.row_of(f"p{i}") == i for i in range(one.count))


def test_the_cut_changes_nothing_that_is_read(build, source, tmp_path, monkeypatch):
    whole = build(source, "whole", Cut())
    assert len(whole.manifest["shards"]) == 1
    monkeypatch.setattr(id_buckets, "BUCKET_ROWS", 4)
    monkeypatch.setattr(id_buckets, "_AT_ONCE", 1)
    ranges = build(source, "ranges")
    assert len(ranges.manifest["shards"]) > 10 and ranges.manifest["buckets"] == 16
    # A line belongs to the range in which it begins; a table is cut by rows.
    table = tmp_path / "p.tsv"
    rows = [
        "id\ttext\ttitle",
        *("\t".join(r[k] for k in ("id", "text", "title")) for r in records()),
    ]
    table.write_text("\n".join(rows))
    lots = build(table, "lots")
    assert [one["rows"] for one in lots.manifest["shards"]] == [7] * 7 + [1]
    for other in (ranges, lots):
        same(whole, other)
        assert other.content_hash == whole.content_hash
    assert build(table, "ranges").content_hash == whole.content_hash  # the same passages


def test_any_zarr_library_reads_its_arrays(build, source):
    store = build(source)
    name = store.manifest["shards"][2]["name"]
    folder = store.directory / "shards" / name / "reader"
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    values = tensorstore.open(spec).result().read().result()
    start = sum(one["rows"] for one in store.manifest["shards"][:2])
    row = store.reader_tokens_nl[start]
    np.testing.assert_array_equal(values[: np.count_nonzero(row)], row[row != 0])
    dense = np.asarray(store.retriever_tokens_nm)
    held = sum(path.stat().st_size for path in store.directory.glob("shards/*/retriever/c/0"))
    assert held == 2 * np.count_nonzero(dense) < dense.nbytes  # no padding


def test_a_killed_build_goes_on_and_makes_no_shard_twice(build, source, tmp_path, monkeypatch):
    build(source, "whole")
    made, limits = [], [3]
    plain = shard_pool.write_shard

    def killed(objects, name, *rest):
        if len(made) == limits[-1]:
            raise KeyboardInterrupt
        made.append(name)
        return plain(objects, name, *rest)

    monkeypatch.setattr(shard_pool, "write_shard", killed)
    for limit in (8, 1000):
        with pytest.raises(KeyboardInterrupt):
            build(source)
        limits.append(limit)
        with pytest.raises(UserError, match="is no passage store"):
            PassageStore.open(tmp_path / "store")
    build(source)
    assert len(made) == len(set(made)) > 10
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_other_passages_begin_anew(build, source, tmp_path, monkeypatch):
    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(id_buckets, "make_round", killed)
        patch.setattr("atlas_jax.index.store_build.make_round", killed)
        with pytest.raises(KeyboardInterrupt):
            build(source)
    assert len(content(tmp_path / "store")) > 50
    other = write(tmp_path / "other.jsonl", records(3))
    assert build(other).count == 3
    assert content(tmp_path / "store") == content(build(other, "fresh").directory)


def test_processes_of_one_machine_make_the_same_bytes(build, source, tmp_path):
    build(source, "alone")
    build(source, "two", Cut(SMALL.part_bytes, SMALL.shard_rows, 2))
    assert content(tmp_path / "two") == content(tmp_path / "alone")
    rows = records()
    rows[40]["text"] = " "
    bad = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError, match=r"bad.jsonl:41: field 'text' is empty"):
        build(bad, "bad", Cut(SMALL.part_bytes, SMALL.shard_rows, 2))
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("suffix", ["jsonl", "md"])  # ranges of bytes, lots of rows
def test_faults_are_named_by_file_and_line(build, tmp_path, suffix):
    rows = records()
    rows[33]["id"] = "p2"
    with pytest.raises(UserError, match=rf"id 'p2': \S*a.{suffix}:3 and \S*a.{suffix}:34; every"):
        build(write(tmp_path / f"a.{suffix}", rows))
    del rows[33]["text"]
    with pytest.raises(UserError, match=rf"b.{suffix}:34: field 'text' is missing"):
        build(write(tmp_path / f"b.{suffix}", rows))
    assert not (tmp_path / "store").exists()
    skips = RowsConfig(skip_broken=True)
    assert build(tmp_path / f"b.{suffix}", rows=skips).count == COUNT - 1


def test_several_paths_are_read_one_after_the_other(build, tmp_path):
    files = [
        write(tmp_path / f"{n}.jsonl", records()[a:b]) for n, a, b in (("b", 0, 20), ("a", 20, 50))
    ]
    store = build([str(files[0]), f"{tmp_path}/a.*"])
    same(store, build(write(tmp_path / "all.jsonl", records()), "all"))


def test_a_store_in_a_bucket(build, source, tmp_path, monkeypatch):
    """TensorStore's memory in place of a bucket."""
    monkeypatch.setattr(objects, "_url", lambda root: root.replace("gs://", "memory://"))
    place = f"gs://{tmp_path.name}/store"
    same(build(source, place), build(source, "disk"))
    assert str(PassageStore.open(place).directory) == place
    assert build(source, place).count == COUNT
    with pytest.raises(UserError, match="another store"):
        build(write(tmp_path / "q.jsonl", records(4)), place)


def test_a_store_that_was_changed_is_read_in_a_bucket(build, source, tokenizers, monkeypatch):
    monkeypatch.setattr(objects, "_url", lambda root: root.replace("gs://", "memory://"))
    disk = build(source).directory
    towers = dict(zip(("reader", "retriever"), tokenizers, strict=True))
    change(disk, Batch(replace=[{"id": "p3", "text": "fresh"}], delete=["p1"]), towers)
    there = objects.Objects(f"gs://{disk.parent.name}/changed")
    for name, raw in content(disk).items():
        there.write(name, raw)
    one, other = LivingStore.as_of(there.root), LivingStore.as_of(disk)
    assert one.count == COUNT - 1 and one.content_hash == other.content_hash
    assert one.passages(range(one.count)) == other.passages(range(one.count))
    np.testing.assert_array_equal(one.reader_tokens_nl, other.reader_tokens_nl)
    assert LivingStore.as_of(there.root, "0").row_of("p1") == 1


def test_a_store_of_format_1_is_read_compared_and_changed(build, source, tmp_path, tokenizers):
    new = build(source)
    folder = write_flat(new, tmp_path / "old")
    old = PassageStore.open(folder, *tokenizers)
    assert isinstance(old.reader_tokens_nl, np.memmap)
    same(new, old)
    assert PassageStore.build(source, folder, *tokenizers, CONFIG, progress=False).count == COUNT
    with pytest.raises(UserError, match="another store"):
        PassageStore.build(write(tmp_path / "q.jsonl", records(4)), folder, *tokenizers, CONFIG)
    towers = dict(zip(("reader", "retriever"), tokenizers, strict=True))
    change(folder, Batch(add=[{"id": "new", "text": "fresh"}], delete=["p1"]), towers)
    living = LivingStore.as_of(folder)
    assert living.count == COUNT and living.passage(living.row_of("new"))["text"] == "fresh"
    assert [len(one.manifest.get("shards", [])) for one in living.segments] == [0, 1]
    want = np.delete(np.asarray(new.reader_tokens_nl), 1, axis=0)
    np.testing.assert_array_equal(living.reader_tokens_nl[: COUNT - 1], want)
    (folder / "passages.jsonl").unlink()
    with pytest.raises(UserError, match=r"passages.jsonl is missing or .*no such file.*anew"):
        PassageStore.open(folder)
