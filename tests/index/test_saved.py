"""A saved index: round trip, placement, refusals, failures on the way."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Layout

from atlas_jax.core.errors import Interrupted, UserError
from atlas_jax.core.objects import Objects
from atlas_jax.core.partitioning import MeshConfig, activate, make_mesh
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.arrays import Rows
from atlas_jax.index.exact import ExactSearcher
from atlas_jax.index.int8 import quantized
from atlas_jax.index.new_index import new_index, save_index, shared_index
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.placement import ROW_BY_ROW, in_layout, rows_sharding, to_device
from atlas_jax.index.saved import load_index
from atlas_jax.index.store_files import StoreConfig


@pytest.fixture
def make_store(tmp_path, reader_tokenizer_file, retriever_tokenizer_file):
    def make(count=30, name="store", text="Text"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(
                json.dumps({"id": f"p{i}", "title": "T", "text": f"{text} {i}"}) + "\n"
                for i in range(count)
            )
        )
        return PassageStore.build(
            path,
            tmp_path / name,
            Tokenizer.from_file(reader_tokenizer_file),
            Tokenizer.from_file(retriever_tokenizer_file),
            StoreConfig(reader_length=30, retriever_length=16),
            progress=False,
        )

    return make


def embeddings(count, e=8, seed=0):
    return np.random.default_rng(seed).standard_normal((count, e)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_round_trip(make_store, tmp_path, dtype):
    store = make_store()
    want = embeddings(40).astype(dtype)  # ten rows of padding, as in a DeviceIndex
    save_index(tmp_path / "index", jnp.asarray(want), store, "enc", version=3)
    got = load_index(tmp_path / "index", store, "enc")
    assert (got.version, got.encoder_hash) == (3, "enc")
    assert got.embeddings_ne.dtype == dtype and isinstance(got.embeddings_ne, Rows)
    rows_ne = np.asarray(got.embeddings_ne)
    np.testing.assert_array_equal(rows_ne.view(np.uint8), want[:30].view(np.uint8))


@pytest.mark.parametrize(
    "config", [None, MeshConfig(data=8), MeshConfig(data=4, model=2), MeshConfig(2, 2, 2)]
)
@pytest.mark.parametrize("memory_mapped", [True, False])
def test_any_number_of_devices_gets_the_same_index(make_store, tmp_path, config, memory_mapped):
    store = make_store(300)
    want = embeddings(300)
    save_index(tmp_path / "index", want, store, "enc")
    source = load_index(tmp_path / "index", store, "enc").embeddings_ne if memory_mapped else want
    mesh = make_mesh(config) if config else None
    index = to_device(source, store, mesh, version=2)
    assert int(index.count) == 300 and int(index.version) == 2
    rows = len(index.embeddings_ne)
    assert rows % (128 * (8 if mesh else 1)) == 0
    for got, expected in [
        (index.embeddings_ne, want),
        (index.reader_tokens_nl, store.reader_tokens_nl),
        (index.retriever_tokens_nm, store.retriever_tokens_nm),
    ]:
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got[:300], expected)
        assert not np.asarray(got[300:]).any()
        assert {s.data.shape[0] for s in got.addressable_shards} == {rows // (8 if mesh else 1)}
    query_be = embeddings(3, seed=1)
    found = ExactSearcher(index, mesh).search(query_be, 300)
    best = np.argsort(-(query_be @ want.T), axis=1)
    np.testing.assert_array_equal(found.rows_bk[:, :20], best[:, :20])


def test_active_mesh_and_slices(make_store, tmp_path):
    store = make_store(30)
    both = np.lib.format.open_memmap(tmp_path / "both.npy", "w+", np.float32, (60, 8))
    both[:] = embeddings(60)
    with activate(make_mesh(MeshConfig(data=8))):
        index = to_device(both[30:], store)  # a slice of a map is not its file's beginning
    assert len(index.embeddings_ne.sharding.device_set) == 8
    np.testing.assert_array_equal(index.embeddings_ne[:30], both[30:])


def test_an_array_is_laid_otherwise_only_if_it_does_not_lie_so() -> None:
    mesh = make_mesh(MeshConfig(data=8))
    array = jax.device_put(np.arange(96, dtype=np.uint16).reshape(16, 6), rows_sharding(mesh))
    assert in_layout(array, ROW_BY_ROW) is array  # as a CPU lays it
    by_columns = Layout(major_to_minor=(1, 0))
    with activate(mesh):
        turned = in_layout(array, by_columns)
    assert turned.format.layout.major_to_minor == by_columns.major_to_minor
    assert turned.sharding == rows_sharding(mesh)
    np.testing.assert_array_equal(turned, np.arange(96).reshape(16, 6))


def test_an_index_of_something_else_is_refused(make_store, tmp_path):
    store, other = make_store(), make_store(name="other", text="Words")
    save_index(tmp_path / "index", embeddings(30), store, "a" * 64)
    with pytest.raises(UserError, match="another passage encoder .a{12}. than this model's .b{12}"):
        load_index(tmp_path / "index", store, "b" * 64)
    with pytest.raises(
        UserError, match=f"{store.retriever_hash[:12]}.*{other.retriever_hash[:12]}.*build_index"
    ):
        load_index(tmp_path / "index", other, "a" * 64)
    with pytest.raises(UserError, match="is no index .*build_index"):
        load_index(tmp_path / "nowhere", store, "a" * 64)
    with pytest.raises(ValueError, match="29 embeddings for 30"):
        save_index(tmp_path / "index", embeddings(29), store, "a" * 64)
    with pytest.raises(ValueError, match="29 embeddings for 30"):
        to_device(embeddings(29), store)
    with pytest.raises(UserError, match="float16.*can be float32, bfloat16, int8"):
        save_index(tmp_path / "index", embeddings(30).astype(np.float16), store, "a" * 64)


def test_a_damaged_index_is_refused(make_store, tmp_path):
    store = make_store()
    save_index(tmp_path / "index", embeddings(30), store, "enc")
    (array,) = (tmp_path / "index").glob("*/rows/c/0/0")
    os.truncate(array, array.stat().st_size - 4)
    with pytest.raises(UserError, match="rows/c/0/0: it has 956 bytes instead of 960"):
        np.asarray(load_index(tmp_path / "index", store, "enc").embeddings_ne)
    array.unlink()  # zarr itself would read zeros
    with pytest.raises(UserError, match="rows/c/0/0: No such file"):
        to_device(load_index(tmp_path / "index", store, "enc").embeddings_ne, store)
    (tmp_path / "index" / "index.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="index format 99"):
        load_index(tmp_path / "index", store, "enc")


def test_folders_with_other_things_are_left_alone(make_store, tmp_path):
    store = make_store()
    with pytest.raises(UserError, match="exists and is no index"):
        save_index(store.directory, embeddings(30), store, "enc")
    PassageStore.open(store.directory)


def test_a_newer_version_replaces_the_older(make_store, tmp_path):
    store = make_store()
    for version in (0, 1):
        save_index(tmp_path / "index", embeddings(30, seed=version), store, "enc", version)
    assert len(list((tmp_path / "index").iterdir())) == 2
    got = load_index(tmp_path / "index", store, "enc")
    np.testing.assert_array_equal(got.embeddings_ne, embeddings(30, seed=1))


@pytest.mark.parametrize("failure", ["full disk", "error", "kill"])
def test_a_failure_keeps_the_previous_version(make_store, tmp_path, failure):
    store = make_store()
    folder = tmp_path / "index"
    save_index(folder, embeddings(30), store, "enc")
    if failure == "full disk":  # files may not grow past 500 bytes, which fails as it does
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, old[1]))
        try:
            with pytest.raises(UserError, match="index could not be written, nothing of it"):
                save_index(folder, embeddings(30, seed=1), store, "enc", 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    elif failure == "error":
        with pytest.raises(KeyboardInterrupt), new_index(folder, store, "enc", 8) as out:
            out[:] = 1
            raise KeyboardInterrupt
    else:
        script = f"""
import os, signal
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.new_index import new_index
with new_index({str(folder)!r}, PassageStore.open({str(store.directory)!r}), "enc", 8) as out:
    out[:] = 1
    os.kill(os.getpid(), signal.SIGKILL)
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
    np.testing.assert_array_equal(load_index(folder, store, "enc").embeddings_ne, embeddings(30))
    save_index(folder, embeddings(30, seed=2), store, "enc", 2)  # which also clears up
    assert load_index(folder, store, "enc").version == 2
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("end", ["interrupted", "disk", "other encoder"])
def test_a_build_goes_on_where_an_earlier_attempt_ended(make_store, tmp_path, end):
    store, folder = make_store(), tmp_path / "index"
    save_index(folder, embeddings(30, seed=9), store, "before")
    arguments = (folder, store, "enc", 8, "float32", 0, 10)

    def attempt(error):
        with shared_index(*arguments) as made:
            assert not made.done
            made.embeddings_ne[np.arange(10, 20)] = embeddings(30)[10:20]
            made.embeddings_ne[:10] = embeddings(30)[:10]
            made.embeddings_ne[20:25] = 7  # no whole chunk, so to be made again
            raise error

    if end == "disk":
        with pytest.raises(UserError, match="nothing of it was kept: .*No space left on device"):
            attempt(OSError(28, "No space left on device"))
    else:
        with pytest.raises(KeyboardInterrupt):
            attempt(KeyboardInterrupt())
    assert load_index(folder, store, "before").version == 0  # still served

    encoder = "another" if end == "other encoder" else "enc"
    with shared_index(folder, store, encoder, *arguments[3:]) as made:
        assert made.done == (frozenset({0, 1}) if end == "interrupted" else frozenset())
        rest = [number for number in range(3) if number not in made.done]
        for number in rest:
            at = slice(10 * number, 10 * number + 10)
            made.embeddings_ne[at] = embeddings(30)[at]
    got = load_index(folder, store, encoder).embeddings_ne
    np.testing.assert_array_equal(got, embeddings(30))
    assert len(list(folder.iterdir())) == 2
    with pytest.raises(ValueError, match="lack rows"), shared_index(*arguments) as made:
        made.embeddings_ne[:5] = 1


def test_a_kill_at_any_chunk_leaves_what_the_next_attempt_can_go_on_with(make_store, tmp_path):
    store, folder, left = make_store(), tmp_path / "index", []

    def build(folder, copies):
        with shared_index(folder, store, "enc", 8, "int8", 0, 10) as made:
            for number in sorted(set(range(3)) - set(made.done)):
                if copies:  # what a kill would leave now
                    made.embeddings_ne.wait_for_whole()
                    left.append(tmp_path / f"left{number}")
                    # TensorStore's own locks come and go in the background.
                    shutil.copytree(folder, left[-1], ignore=shutil.ignore_patterns("*.__lock"))
                at = slice(10 * number, 10 * number + 10)
                made.embeddings_ne[at] = embeddings(30)[at]
            return set(made.done)

    build(folder, True)
    (left[2] / next(left[2].glob("*/scales/c/0")).relative_to(left[2])).unlink()  # half a chunk
    assert [build(one, False) for one in left] == [set(), {0}, {1}]
    for one in left:
        got = load_index(one, store, "enc").embeddings_ne
        np.testing.assert_array_equal(got.values_ne, quantized(embeddings(30)).values_ne)
        assert len(list(one.iterdir())) == 2


PEAK_SCRIPT = """
import re, sys, numpy as np, jax
from atlas_jax.core.partitioning import MeshConfig, make_mesh
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.placement import ROW_BY_ROW, in_layout, rows_sharding, to_device
from atlas_jax.index.saved import load_index
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
jax.config.update("jax_num_cpu_devices", int(sys.argv[3]))
mesh = make_mesh(MeshConfig())
jax.block_until_ready(jax.device_put(np.ones(5)))
before = peak()
store = PassageStore.open(sys.argv[1])
saved = load_index(sys.argv[2], store, "enc")
index = jax.block_until_ready(to_device(saved.embeddings_ne, store, mesh))
print((peak() - before) / sum(x.nbytes for x in jax.tree.leaves(index)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_loading_peaks_below_1_2_times_the_index(make_store, tmp_path, devices):
    store = make_store(20_000)
    with new_index(tmp_path / "index", store, "enc", 2560) as out:  # 205 MB
        for start in range(0, store.count, 1000):
            out[start : start + 1000] = 1.0
    done = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, store.directory, tmp_path / "index", str(devices)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.2


def test_an_index_that_lacks_a_chunk_or_is_damaged_is_not_taken_for_one(make_store, tmp_path):
    store, folder = make_store(), tmp_path / "index"

    def build(before_end):
        with shared_index(folder, store, "enc", 8, "float32", 0, 10) as made:
            for number in sorted(set(range(3)) - set(made.done)):
                at = slice(10 * number, 10 * number + 10)
                made.embeddings_ne[at] = embeddings(30)[at]
            made.embeddings_ne.wait_for_whole()
            before_end()

    def lose():  # as a host that writes into a folder of its own
        next(folder.glob("embeddings-*/rows/c/1/0")).unlink()

    with pytest.raises(UserError, match=r"rows: 1 of 3 chunks are missing, the first is 1; let"):
        build(lose)
    assert not (folder / "index.json").exists()
    next(folder.glob("embeddings-*/rows/zarr.json")).write_text("{")
    with pytest.raises(UserError, match="could not be written, nothing of it was kept: .*zarr"):
        build(lambda: None)
    build(lambda: None)
    np.testing.assert_array_equal(load_index(folder, store, "enc").embeddings_ne, embeddings(30))
    next(folder.glob("embeddings-*/rows/c/1/0")).unlink()
    with pytest.raises(UserError, match="c/1/0: No such file or directory; build it anew with"):
        np.asarray(load_index(folder, store, "enc").embeddings_ne)


def test_an_index_is_not_removed_because_its_manifest_cannot_be_read(
    make_store, tmp_path, monkeypatch
):
    store, folder, plain = make_store(), tmp_path / "index", Objects.read
    save_index(folder, embeddings(30), store, "enc")

    def read(self, name):
        if name == "index.json":
            raise Interrupted(f"{name}: the bucket does not answer")
        return plain(self, name)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="does not answer"):
        patch.setattr(Objects, "read", read)
        save_index(folder, embeddings(30, seed=1), store, "enc", version=1)
    np.testing.assert_array_equal(load_index(folder, store, "enc").embeddings_ne, embeddings(30))
