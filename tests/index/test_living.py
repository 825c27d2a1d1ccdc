"""A store that changes: any sequence of changes reads like a store built of the same passages."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlas_jax.core import meeting
from atlas_jax.core.errors import Interrupted, UserError
from atlas_jax.core.meeting import Meeting
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index import changes
from atlas_jax.index.changes import Batch, change, compact
from atlas_jax.index.inspection import describe_versions, lines_of_versions
from atlas_jax.index.int8 import as_floats, stored_as
from atlas_jax.index.living import LivingStore
from atlas_jax.index.new_index import save_index
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.segment_indices import (
    encoder_of,
    folder_of,
    load_embeddings,
    remove_unnamed,
    save_compacted,
)
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.index.versions import changing, versions_of

ROOT = Path(__file__).parents[2]
CONFIG = StoreConfig(reader_length=24, retriever_length=16)
FIRST = [{"id": f"p{i}", "title": "T", "section": "", "text": f"word {i}"} for i in range(4)]


@pytest.fixture(scope="session")
def towers(reader_tokenizer_file, retriever_tokenizer_file):
    return {
        "reader": Tokenizer.from_file(reader_tokenizer_file),
        "retriever": Tokenizer.from_file(retriever_tokenizer_file),
    }


def built(folder, records, towers, name="store"):
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in records))
    PassageStore.build(file, folder / name, *towers.values(), CONFIG, progress=False)
    return folder / name


def embedded(store):
    """What some passage tower might make of the tokens, however many rows there are."""
    tokens = np.asarray(store.retriever_tokens_nm, np.float64)
    rows = tokens @ np.random.default_rng(0).normal(size=(tokens.shape[1], 4))
    return rows.astype(np.float32)


def saver(index, dtype="float32"):
    def save(name, segment, now=None):
        rows = embedded(segment)
        place = folder_of(index, segment, name)
        save_index(place, rows if dtype == "float32" else stored_as(rows, dtype), segment, "e")

    return save


def joined(directory, index, keep=1):
    """Compact store and index, as the command does."""

    def copy(name, living):
        save_compacted(index, name, living, encoder_of(index, living))

    store = compact(directory, keep, copy)
    remove_unnamed(index, store)
    return store


def held(store):
    return [store.passage(row) for row in range(store.count)]


def text_of(passage_id, text):
    return {"id": passage_id, "title": "T", "section": "", "text": text}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "replace", "delete", "mixed", "compact"]), st.integers(0, 99)
    ),
    min_size=1,
    max_size=6,
)


def alone(work):
    """What a single process returns; see `two`."""
    return [work(0)]


@pytest.mark.parametrize(("dtype", "processes"), [("float32", 1), ("float32", 2), ("int8", 2)])
@settings(
    max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(steps=STEPS)
def test_any_changes_give_what_a_build_of_the_same_passages_gives(
    tmp_path_factory, towers, dtype, processes, two, steps
):
    folder = tmp_path_factory.mktemp("living")
    directory, index = built(folder, FIRST, towers), folder / "index"
    save = saver(index, dtype)
    save("", PassageStore.open(directory))
    wanted, states = {one["id"]: one for one in FIRST}, {0: list(FIRST)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changes, "SHARD_ROWS", 2)  # so that both have something to write
        together = two if processes == 2 else alone
        for number, (what, drawn) in enumerate(steps):
            some = sorted(wanted)[drawn % len(wanted)]
            is_new = what in ("add", "mixed")
            add = [text_of(f"n{number}{i}", f"new {drawn}") for i in range(is_new * (drawn % 4))]
            replace = [text_of(some, f"other {number}")] if what == "replace" else []
            delete = [some] if what in ("delete", "mixed") and len(wanted) + len(add) > 1 else []
            batch, keep = Batch(add, replace, delete), 1 + drawn % 3
            if what == "compact":
                made = together(lambda _, keep=keep: joined(directory, index, keep))
            elif add or replace or delete:
                made = together(
                    lambda _, batch=batch: change(directory, batch, towers, saver(index, dtype))
                )
            else:
                continue
            (version,) = {one.version["version"] for one in made}
            wanted = {**{k: v for k, v in wanted.items() if k not in delete}}
            wanted |= {one["id"]: one for one in (*add, *replace)}
            states[version] = list(wanted.values())
    oldest = versions_of(directory)[-1]["oldest"] if versions_of(directory) else 0
    for version, records in states.items():
        if version < oldest:
            with pytest.raises(UserError, match=f"has the versions {oldest} to"):
                LivingStore.as_of(directory, str(version))
            continue
        store = LivingStore.as_of(directory, str(version), *towers.values())
        assert_alike(store, records, PassageStore.open(
            built(folder, held(store), towers, f"again{version}")
        ), load_embeddings(index, store, "e").embeddings_ne, dtype)  # fmt: skip


def assert_alike(store, records, again, rows, dtype):
    """A version holds these passages, and tokens and embeddings as a store built of them."""
    assert sorted(held(store), key=lambda one: one["id"]) == sorted(
        records, key=lambda one: one["id"]
    )
    np.testing.assert_array_equal(store.reader_tokens_nl, again.reader_tokens_nl)
    np.testing.assert_array_equal(store.retriever_tokens_nm, again.retriever_tokens_nm)
    assert store.manifest["reader"]["max_id"] >= again.manifest["reader"]["max_id"]
    expected = stored_as(embedded(again), dtype)
    rows = jax.tree.map(np.asarray, rows)
    np.testing.assert_allclose(as_floats(rows), as_floats(expected), rtol=1e-5)
    for row, record in enumerate(held(store)):
        assert store.find(record["id"]) == row
    assert store.find("nobody") is None


def test_a_fault_of_one_process_is_told_by_all_and_nothing_stays(tmp_path, towers, two):
    directory, index = built(tmp_path, FIRST, towers), tmp_path / "index"
    saver(index)("", PassageStore.open(directory))

    def make(batches, faulty=lambda index: None):
        def embed(name, segment, now):
            plain, place = saver(index), folder_of(index, segment, name)
            Meeting("embed").together("embed", lambda: faulty(place))
            plain(name, segment)

        tidy = lambda store: remove_unnamed(index, store)  # noqa: E731
        return two(lambda i: change(directory, batches[i], towers, embed, tidy=tidy))

    good, other = (Batch(add=[text_of("a", text)]) for text in ("one", "two"))
    for one in make([good, other]):
        assert isinstance(one, Interrupted)
        assert "process 1 of 2 was given other changes than process 0" in str(one)
    found = make([good, Batch(add=[text_of("a", " ")])])
    assert "process 1 of 2: add: passage 0: " in str(found[0])
    assert str(found[1]).startswith("add: passage 0: field 'text' is empty")

    def full(place):
        save_index(place, np.zeros((9, 4), np.float32), PassageStore.open(directory), "e")
        raise OSError(28, "No space left on device")

    assert all("No space left on device" in str(one) for one in make([good] * 2, full))
    assert versions_of(directory) == [] and list((directory / "segments").iterdir()) == []
    assert not list((index / "embeddings-of-segments").iterdir())
    assert not (directory / "versions" / ".lock").exists()
    assert [one.version["version"] for one in make([good] * 2)] == [1, 1]


def test_a_second_writer_is_refused_and_takes_nothing_away(tmp_path, towers):
    directory, tidied = built(tmp_path, FIRST, towers), []
    with changing(directory):
        (directory / "segments" / "000001-0000000a").mkdir(parents=True)  # no version names it yet
        for second in (
            lambda: change(directory, Batch(delete=["p0"]), {}, tidy=tidied.append),
            lambda: compact(directory, tidy=tidied.append),
        ):
            with pytest.raises(UserError, match=f"another process .{os.getpid()}.; wait"):
                second()
        assert (directory / "segments" / "000001-0000000a").exists() and tidied == []
    assert change(directory, Batch(delete=["p0"]), {}, tidy=tidied.append).count == 3
    assert [one.count for one in tidied] == [3]
    assert not list((directory / "segments").iterdir())


def test_a_process_that_is_missing_is_named_and_nothing_stays(tmp_path, towers, two, monkeypatch):
    directory = built(tmp_path, FIRST, towers)
    monkeypatch.setattr(meeting, "GIVE_UP", 0.3)
    batch = Batch(add=[text_of("a", "one")])
    found, other = two(lambda index: None if index else change(directory, batch, towers))
    assert isinstance(found, Interrupted) and other is None
    assert "nothing was heard of process 1 of 2" in str(found)
    assert versions_of(directory) == [] and not (directory / "segments").exists()
    assert change(directory, batch, towers).version["version"] == 1


def test_a_store_that_never_changed_is_read_as_it_is(tmp_path, towers):
    plain = PassageStore.open(built(tmp_path, FIRST, towers))
    store = LivingStore.as_of(tmp_path / "store")
    assert (store.content_hash, store.retriever_hash) == (plain.content_hash, plain.retriever_hash)
    assert store.reader_tokens_nl is store.segments[0].reader_tokens_nl
    assert not (tmp_path / "store" / "versions").exists()


def test_a_version_is_found_by_its_number_and_by_a_time(tmp_path, towers):
    directory = built(tmp_path, FIRST, towers)
    change(directory, Batch(add=[text_of("a", "one")]), towers)
    between = versions_of(directory)[-1]["time"]
    change(directory, Batch(delete=["a", "p0"]), {})
    counts = {as_of: LivingStore.as_of(directory, as_of).count for as_of in ("", "0", "1", "2")}
    assert counts == {"": 3, "0": 4, "1": 5, "2": 3}
    assert LivingStore.as_of(directory, between).version["version"] == 1
    assert LivingStore.as_of(directory, "2000-01-01").count == 4
    with pytest.raises(UserError, match="has the versions 0 to 2"):
        LivingStore.as_of(directory, "3")
    with pytest.raises(UserError, match="'soon': expected a version's number"):
        LivingStore.as_of(directory, "soon")
    lines = lines_of_versions(describe_versions(directory))
    assert lines[1] == "version 0: 4 passages, 1 segment; as built"
    assert lines[2].endswith("5 passages, 2 segments; 1 added")
    assert lines[3].endswith("3 passages, 2 segments; 2 deleted")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Batch(add=[text_of("p1", "x")]), "has a passage with the id 'p1' already"),
        (Batch(replace=[text_of("new", "x")]), "replace: .* has no passage with the id 'new'"),
        (Batch(delete=["new"]), "delete: .* has no passage with the id 'new'"),
        (Batch(delete=["p1"], replace=[text_of("p1", "x")]), "'p1' is changed twice"),
        (Batch(delete=["p0", "p1", "p2", "p3"]), "would hold no passage"),
        (Batch(add=[text_of("a", " ")]), "field 'text' is empty"),
        (Batch(), "nothing to change"),
    ],
)
def test_a_batch_at_fault_changes_nothing(tmp_path, towers, batch, message):
    directory = built(tmp_path, FIRST, towers)
    with pytest.raises(UserError, match=message):
        change(directory, batch, towers)
    assert versions_of(directory) == []
    assert held(LivingStore.as_of(directory)) == FIRST


def test_a_segment_that_cannot_be_embedded_leaves_no_version(tmp_path, towers):
    directory = built(tmp_path, FIRST, towers)

    def fail(name, segment, now):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        change(directory, Batch(add=[text_of("a", "x")]), towers, fail)
    assert versions_of(directory) == []
    store = change(directory, Batch(delete=["p0"]), {})
    assert store.version["version"] == 1
    assert list((directory / "segments").iterdir()) == []


def test_a_damaged_version_is_named(tmp_path, towers):
    directory = built(tmp_path, FIRST, towers)
    change(directory, Batch(delete=["p0"]), {})
    (directory / "versions" / "000001.dead.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match="000001.dead.npy"):
        LivingStore.as_of(directory)


# Changes store and index at random, and builds stores beside them. It tells what it begins, and the
# version once it is acknowledged.
CHILD = """
import json, random, shutil, sys
from pathlib import Path
from tests.index.test_living import (
    Batch, LivingStore, Tokenizer, built, change, held, joined, saver, text_of
)
folder, seed, *files = sys.argv[1:]
directory, index = Path(folder) / "store", Path(folder) / "index"
towers = dict(zip(("reader", "retriever"), map(Tokenizer.from_file, files)))
drawn, now = random.Random(seed), LivingStore.as_of(directory)
beside, gone = Path(folder) / "beside", Path(folder) / "gone"

def clear():  # a finished store, which the one that was killed may have left; no half of one
    shutil.rmtree(gone, ignore_errors=True)
    if (beside / "manifest.json").exists():
        beside.rename(gone)
        shutil.rmtree(gone)

clear()
print("ready", flush=True)
while True:
    ids, number = sorted(one["id"] for one in held(now)), now.version["version"] + 1
    what = drawn.choice(["add", "add", "replace", "delete", "compact", "build"])
    some = drawn.choice(ids)
    add = [text_of(f"c{number}", f"text {number}")] if what in ("add", "delete") else []
    replace = [text_of(some, f"other {number}")] if what == "replace" else []
    delete = [some] if what == "delete" else []
    print(json.dumps([what, add, replace, delete]), flush=True)
    if what == "build":
        built(Path(folder), held(now), towers, "beside")
        clear()
    elif what == "compact":
        now = joined(directory, index, 2)
    else:
        now = change(directory, Batch(add, replace, delete), towers, saver(index))
    print(now.version["version"], flush=True)
"""


def killed(folder, files, seed, drawn):
    """What a child told until it was killed, at a random moment."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(seed), *map(str, files)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    lines = [child.stdout.readline() for _ in range(drawn.randrange(8))]
    time.sleep(drawn.uniform(0, 0.05))
    child.send_signal(signal.SIGKILL)
    lines += child.communicate()[0].splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_lose_nothing_that_was_acknowledged(
    tmp_path, towers, reader_tokenizer_file, retriever_tokenizer_file, times
):
    directory, index = built(tmp_path, FIRST, towers), tmp_path / "index"
    saver(index)("", PassageStore.open(directory))
    files, drawn = (reader_tokenizer_file, retriever_tokenizer_file), random.Random(times)
    state, version = {one["id"]: one for one in FIRST}, 0
    for turn in range(times):
        then = state
        for told in killed(tmp_path, files, turn, drawn):
            if isinstance(told, int):
                state, version = then, told
                continue
            _, add, replace, delete = told
            then = {k: v for k, v in state.items() if k not in delete}
            then |= {one["id"]: one for one in (*add, *replace)}
        store = LivingStore.as_of(directory, "", *towers.values())
        if store.version["version"] != version:  # made, but not acknowledged any more
            assert store.version["version"] == version + 1
            state, version = then, version + 1
        assert {one["id"]: one for one in held(store)} == state
        rows = np.asarray(load_embeddings(index, store, "e").embeddings_ne)
        np.testing.assert_allclose(rows, embedded(store), rtol=1e-5)
        for one in versions_of(directory):
            assert len(held(LivingStore.as_of(directory, str(one["version"])))) == one["count"]
    store = joined(directory, index)
    again = PassageStore.open(built(tmp_path, held(store), towers, "again"))
    rows = load_embeddings(index, store, "e").embeddings_ne
    assert_alike(store, list(state.values()), again, rows, "float32")
    names = set(store.version["segments"]) - {""}
    assert {path.name for path in (directory / "segments").glob("*")} == names
    assert {path.name for path in (index / "embeddings-of-segments").glob("*")} == names
    assert version > times // 2  # it was not always killed before its first change
