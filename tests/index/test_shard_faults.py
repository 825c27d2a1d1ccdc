"""Stores in shards: what is kept and what is removed after kills, faults and other runs."""

import itertools
import json
import os
import threading
import time
import types
from concurrent import futures

import numpy as np
import pytest

from atlas_jax.core import locks, meeting, objects
from atlas_jax.core.errors import Interrupted, UserError
from atlas_jax.core.jsonl import STRICT
from atlas_jax.core.objects import Objects
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.unique import hash_id, repeated
from atlas_jax.index import shard_pool, store_build
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.shard_pool import Job, ShardPool
from atlas_jax.index.shard_writer import Recipe
from tests.index.test_shards import CONFIG, builder, content, records, write

SOME = 20


@pytest.fixture(scope="module")
def tokenizers(reader_tokenizer_file, retriever_tokenizer_file):
    return Tokenizer.from_file(reader_tokenizer_file), Tokenizer.from_file(retriever_tokenizer_file)


@pytest.fixture
def build(tmp_path, tokenizers):
    return builder(tmp_path, tokenizers)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "p.jsonl", records(SOME))


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def kill(*given):
    raise KeyboardInterrupt


def kill_at_ids(build, source):
    """A build all of whose shards are made."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store_build, "make_round", kill)
        build(source)


def test_what_a_kill_leaves_among_the_marks_is_no_mark(build, source, store):
    kill_at_ids(build, source)
    done = store / "unfinished" / "done"
    first, second, third = sorted(done.iterdir())[:3]
    (done / f"{first.name}.__lock").write_text('{"na')  # killed within the write
    first.unlink()
    second.write_text("{")
    third.write_text(third.read_text().replace('"hash": "', '"hash": "x'))
    build(source)
    assert content(store) == content(build(source, "whole").directory)


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_a_kill_while_another_store_is_removed_misleads_nobody(
    build, source, store, monkeypatch, calls
):
    kill_at_ids(build, source)
    other, plain, left = write(store.parent / "q.jsonl", records(3)), Objects.remove, [calls]

    def remove(self, below=""):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        plain(self, below)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Objects, "remove", remove)
        build(other)
    build(source)  # not the other one
    assert content(store) == content(build(source, "whole").directory)


def test_a_kill_at_the_very_beginning_or_end_is_no_hindrance(build, source, store, monkeypatch):
    (store / "unfinished").mkdir(parents=True)
    (store / "unfinished" / "plan.json.__lock").touch()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Objects, "remove", kill)  # the manifest is there
        build(source)
    assert (store / "unfinished").is_dir() and build(source).count == SOME
    assert content(store) == content(build(source, "whole").directory)


def test_a_store_that_another_run_took_over_is_left_alone(build, source, store, monkeypatch):
    plain = store_build.make_round
    other = json.dumps({"plan": "0", "run": "1"}).encode()

    def taken(place, *given):
        place.write("unfinished/plan.json", other)
        return plain(place, *given)

    monkeypatch.setattr(store_build, "make_round", taken)
    with pytest.raises(Interrupted, match="store: another run writes this store since"):
        build(source)
    assert (store / "unfinished" / "plan.json").read_bytes() == other
    with pytest.raises(UserError, match="duplicate"):
        build(write(source, [*records(3), records(1)[0]]))
    assert (store / "shards").is_dir()  # the other's, as far as this run knows


class Deadly:
    """Kills the process that gets it."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_killed_worker_is_told_and_what_is_done_is_kept(tmp_path, tokenizers):
    recipe = Recipe(CONFIG, dict(zip(("reader", "retriever"), tokenizers, strict=True)))
    pool = ShardPool(2, str(tmp_path), recipe, STRICT)
    with pytest.raises(Interrupted, match=r"was killed.* bind CorpusConfig.workers to fewer"):
        pool.run(iter([Job("00000-00000", Deadly(), True)]), print)


def test_an_id_that_all_passages_have_is_read_twice():
    hashes, read = np.full(1000, hash_id("x"), np.uint64), []
    assert next(repeated(hashes, lambda row: read.append(row) or "x")) == (1, 0)
    assert read == [0, 1]


@pytest.mark.parametrize("error", [ValueError("no permission"), RuntimeError("no network")])
def test_a_bucket_that_cannot_be_reached_is_named(monkeypatch, error):
    monkeypatch.setattr(objects, "_url", lambda root: root.replace("gs://", "memory://"))
    place = Objects("gs://bucket/store")

    def fails(*given, **told):
        begun = futures.Future()
        begun.set_exception(error)
        return begun

    place.__dict__["_store"] = types.SimpleNamespace(
        list=fails, read=fails, delete_range=fails, write=fails
    )
    for look in (place.names, lambda: place.read("a"), lambda: place.has("a")):
        with pytest.raises(Interrupted, match=r"gs://bucket/store/a?: no (permission|network)"):
            look()
    for change in (place.remove, lambda: place.write("a", b"")):
        with pytest.raises(OSError, match="no (permission|network)"):
            change()


def test_a_folder_that_may_not_be_read_is_named(build, source, monkeypatch):
    def is_file(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.is_file", is_file)
    with pytest.raises(UserError, match=r"store/manifest.json: Permission denied"):
        build(source)


def test_hosts_with_other_files_are_told_apart(build, source, tmp_path, two):
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other" / "p.jsonl", records(SOME - 1))
    found = two(lambda index: build(source if index == 0 else other))
    for one in found:
        assert isinstance(one, Interrupted)
        assert "process 1 of 2 sees other files, or files of other sizes, than process 0" in str(
            one
        )
    found = two(lambda index: build(source if index else tmp_path / "none.jsonl"))
    assert [str(one).partition(f"{tmp_path}")[2] for one in found] == [
        "/none.jsonl: no such file"
    ] * 2


def test_a_process_that_is_missing_takes_nothing_away(build, source, store, two, monkeypatch):
    monkeypatch.setattr(meeting, "GIVE_UP", 0.3)
    plain = shard_pool.write_shard

    def write_shard(place, name, *rest):
        if threading.current_thread().name.endswith("_1"):
            time.sleep(1)
        return plain(place, name, *rest)

    monkeypatch.setattr(shard_pool, "write_shard", write_shard)
    found = two(lambda index: build(source))
    assert any("nothing was heard of process" in str(one) for one in found), found
    assert all(isinstance(one, Interrupted) for one in found if isinstance(one, Exception))
    assert list((store / "unfinished" / "done").iterdir())


def test_a_store_that_one_host_does_not_see(build, source, two, monkeypatch):
    has, seen = Objects.has, itertools.count()
    monkeypatch.setattr(Objects, "has", lambda self, name: not next(seen) or has(self, name))
    for one in two(lambda index: build(source)):
        assert "does not see it, but process" in str(one)


def test_a_damaged_shard_is_named_with_what_to_do(build, source, store):
    built, folder = build(source), min((store / "shards").iterdir())
    text = folder / "text.jsonl"
    text.write_bytes(text.read_bytes().replace(b'"id"', b"'id'", 1))
    with pytest.raises(UserError, match=r"text.jsonl: row 0: .*; remove the store and build it"):
        built.passage(0)
    (folder / "reader" / "c" / "0").unlink()
    for at in (slice(0, 2), [0, 1]):
        with pytest.raises(UserError, match=r"reader/c/0: No such file.*; .*build it anew"):
            PassageStore.open(store).reader_tokens_nl[at]


def test_a_disk_without_a_byte_left_is_told_and_left_as_it_was(build, source, store, monkeypatch):
    """The lock cannot be written, nor the plan."""
    spec = "' [tensorstore_spec='{" + 300 * "x" + "}'] [os_error_code='28']"

    def write(*given):
        raise OSError(28, "No space left on device")

    def begin(*given):
        begun = futures.Future()
        begun.set_exception(ValueError("Error writing 'plan': No space left on device" + spec[1:]))
        return begun

    with monkeypatch.context() as patch:
        patch.setattr(locks.os, "write", write)
        patch.setattr(Objects, "begin", begin)
        with pytest.raises(UserError, match=r"could not be written.*No space left on device$"):
            build(source)
        assert not store.exists()
    assert build(source).count == SOME  # nobody holds the lock


def test_a_fault_is_told_though_another_process_is_missing(two, monkeypatch):
    monkeypatch.setattr(meeting, "GIVE_UP", 0.1)

    def work():
        raise UserError("p.jsonl:3: a fault")

    found = two(lambda index: None if index else meeting.Meeting("a store").together("x", work))
    assert str(found[0]) == "p.jsonl:3: a fault"
