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

from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
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
from atlas_jax.index.versions import versions_of

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
    """What some passage tower might make of the tokens."""
    tokens = np.asarray(store.retriever_tokens_nm, np.float32)
    return tokens @ np.random.default_rng(0).normal(size=(tokens.shape[1], 4)).astype(np.float32)


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


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@settings(
    max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(steps=STEPS)
def test_any_changes_give_what_a_build_of_the_same_passages_gives(
    tmp_path_factory, towers, dtype, steps
):
    folder = tmp_path_factory.mktemp("living")
    directory, index = built(folder, FIRST, towers), folder / "index"
    saver(index, dtype)("", PassageStore.open(directory))
    wanted, states = {one["id"]: one for one in FIRST}, {0: list(FIRST)}
    for number, (what, drawn) in enumerate(steps):
        some = sorted(wanted)[drawn % len(wanted)]
        add = [text_of(f"n{number}", f"new {drawn}")] if what in ("add", "mixed") else []
        replace = [text_of(some, f"other {number}")] if what == "replace" else []
        delete = [some] if what in ("delete", "mixed") and len(wanted) + len(add) > 1 else []
        if what == "compact":
            store = joined(directory, index, 1 + drawn % 3)
        elif add or replace or delete:
            store = change(directory, Batch(add, replace, delete), towers, saver(index, dtype))
        else:
            continue
        wanted = {**{k: v for k, v in wanted.items() if k not in delete}}
        wanted |= {one["id"]: one for one in (*add, *replace)}
        states[store.version["version"]] = list(wanted.values())
    oldest = versions_of(directory)[-1]["oldest"] if versions_of(directory) else 0
    for version, records in states.items():
        if version < oldest:
            with pytest.raises(UserError, match=f"has the versions {oldest} to"):
                LivingStore.as_of(directory, str(version))
            continue
        store = LivingStore.as_of(directory, str(version), *towers.values())
        assert sorted(held(store), key=lambda one: one["id"]) == sorted(
            records, key=lambda one: one["id"]
        )
        again = PassageStore.open(built(folder, held(store), towers, f"again{version}"))
        np.testing.assert_array_equal(store.reader_tokens_nl, again.reader_tokens_nl)
        np.testing.assert_array_equal(store.retriever_tokens_nm, again.retriever_tokens_nm)
        assert store.manifest["reader"]["max_id"] >= again.manifest["reader"]["max_id"]
        rows = load_embeddings(index, store, "e").embeddings_ne
        expected = stored_as(embedded(again), dtype)
        rows = jax.tree.map(np.asarray, rows)
        np.testing.assert_allclose(as_floats(rows), as_floats(expected), rtol=1e-5)
        for row, record in enumerate(held(store)):
            assert store.find(record["id"]) == row
        assert store.find("nobody") is None


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


# Adds passages one by one, and tells each version once it is acknowledged.
CHILD = """
import sys
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.changes import Batch, change, compact
from atlas_jax.index.living import LivingStore
directory, *files = sys.argv[1:]
towers = dict(zip(("reader", "retriever"), map(Tokenizer.from_file, files)))
number = LivingStore.as_of(directory).version["version"]
print("ready", flush=True)
while True:
    name = f"c{number + 1}"
    batch = Batch(add=[{"id": name, "text": f"text {name}"}])
    number = change(directory, batch, towers).version["version"]
    print(name, flush=True)
    if number % 7 == 0:
        number = compact(directory, 2).version["version"]
"""


def kill_often(directory, files, times, seed=0):
    """Kill a writer so many times; what it had acknowledged must be there each time."""
    drawn, acknowledged = random.Random(seed), set()
    for _ in range(times):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(directory), *map(str, files)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(drawn.uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        acknowledged |= set(child.communicate()[0].split())
        for one in versions_of(directory):
            store = LivingStore.as_of(directory, str(one["version"]))
            assert store.count == one["count"] == len(held(store))
        assert all(store.find(name) is not None for name in acknowledged)
    store = compact(directory, 1)
    assert len(acknowledged) + len(FIRST) <= store.count
    kept = {path.name for path in (directory / "segments").iterdir()}
    assert kept == set(store.version["segments"]) - {""}
    return len(acknowledged)


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_kill_loses_nothing_that_was_acknowledged(
    tmp_path, towers, reader_tokenizer_file, retriever_tokenizer_file, times
):
    directory = built(tmp_path, FIRST, towers)
    kill_often(directory, (reader_tokenizer_file, retriever_tokenizer_file), times)
