"""An index in 8 bits: rounding, search, files, refresh, and what re-ranking makes good."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core import partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.core.types import DeviceIndex
from atlas_jax.index.arrays import Rows
from atlas_jax.index.exact import exact_search, gather_passages
from atlas_jax.index.int8 import Int8Rows, as_floats, quantized, stored_as
from atlas_jax.index.new_index import new_index, save_index
from atlas_jax.index.placement import embeddings_layout, rows_sharding, to_device
from atlas_jax.index.rolling import refresh_rows
from atlas_jax.index.saved import load_index
from atlas_jax.training.checkpoint import Checkpointer
from atlas_jax.training.config import CheckpointConfig
from tests.index.test_saved import embeddings, make_store  # noqa: F401 (a fixture)

EIGHT = MeshConfig(2, 2, 2)
ROWS = 2048  # 16 blocks of 128 rows, so eight devices have two each


def clustered(rows, width=64, clusters=32, seed=0):
    """Points around random centres: neighbours are as close as passages on one subject."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, width)) * 2
    points = centres[rng.integers(0, clusters, rows)] + rng.standard_normal((rows, width))
    return points.astype(np.float32)


def made_index(mesh, embeddings_ne, count=ROWS - 5):
    tokens = np.arange(embeddings_ne.shape[0], dtype=np.uint16)[:, None]
    place = lambda array: jax.device_put(array, rows_sharding(mesh))  # noqa: E731
    return DeviceIndex(
        embeddings_ne=jax.tree.map(place, embeddings_ne),
        reader_tokens_nl=place(tokens),
        retriever_tokens_nm=place(tokens),
        count=jnp.int32(count),
        version=jnp.int32(0),
    )


def assert_same_rows(got, want):
    np.testing.assert_array_equal(got.values_ne, want.values_ne)
    np.testing.assert_array_equal(got.scales_n, want.scales_n)


def test_rows_are_rounded_by_half_a_step_at_most_and_alike_everywhere():
    floats = embeddings(50, e=33) * np.logspace(-20, 20, 50, dtype=np.float32)[:, None]
    floats[7] = 0
    rows = quantized(floats)
    assert rows.values_ne.dtype == np.int8 and np.abs(rows.values_ne).max() == 127
    largest = np.abs(rows.values_ne).max(axis=1)
    np.testing.assert_array_equal(largest, np.where(floats.any(axis=1), 127, 0))
    off = np.abs(as_floats(rows) - floats)
    assert (off <= rows.scales_n[:, None] * 0.5001).all()
    assert_same_rows(jax.device_get(jax.jit(quantized)(jnp.asarray(floats))), rows)
    # What a bfloat16 tower gives is rounded from its own numbers.
    half = jnp.asarray(floats, jnp.bfloat16)
    assert_same_rows(quantized(half), quantized(np.asarray(half, np.float32)))


def test_a_row_that_is_no_number_stays_none():
    floats = embeddings(3)
    floats[1, 2], floats[2, 3] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        rows = as_floats(quantized(floats))
    assert np.isfinite(rows[0]).all() and np.isnan(rows[1]).all() and np.isnan(rows[2]).any()


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("recall_target", [1.0, 0.9])
def test_search_scores_the_rounded_rows(devices, recall_target):
    mesh = partitioning.make_mesh(EIGHT if devices == 8 else MeshConfig(), jax.devices()[:devices])
    rows, query_be = quantized(clustered(ROWS)), clustered(6, seed=1)
    excluded_bx = np.tile(np.arange(40, dtype=np.int32), (6, 1))
    index = made_index(mesh, rows)
    search = functools.partial(exact_search, k=9, mesh=mesh, recall_target=recall_target)
    found = jax.jit(search)(index, query_be, excluded_bx=excluded_bx)
    queries = np.asarray(jnp.asarray(query_be, jnp.bfloat16), np.float32)
    scores = queries @ as_floats(rows).T
    scores[:, :40] = scores[:, ROWS - 5 :] = -np.inf
    want = np.argsort(-scores, axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(found.rows_bk, want)
    np.testing.assert_allclose(found.scores_bk, np.take_along_axis(scores, want, axis=1), rtol=1e-5)
    # What the reader and the distillation get of these rows.
    passages = jax.jit(functools.partial(gather_passages, mesh=mesh))(index, found)
    np.testing.assert_array_equal(passages.embeddings_bke, as_floats(rows)[want])
    np.testing.assert_array_equal(passages.reader_tokens_bkl[..., 0], want)


def test_rescoring_twice_as_many_makes_the_rounding_good():
    floats, query_be, k = clustered(ROWS), clustered(64, seed=1), 10
    exact = np.argsort(-(query_be @ floats.T), axis=1)[:, :k]
    mesh = partitioning.make_mesh(EIGHT)
    found = exact_search(made_index(mesh, quantized(floats), ROWS), query_be, 2 * k, mesh=mesh)
    wide = np.asarray(found.rows_bk)

    def recall(rows):
        return np.mean([len(set(a) & set(b)) / k for a, b in zip(rows, exact, strict=True)])

    rescored = np.einsum("be,bke->bk", query_be, floats[wide])
    best = np.take_along_axis(wide, np.argsort(-rescored, axis=1)[:, :k], axis=1)
    assert 0.9 < recall(wide[:, :k]) < recall(best) == 1


@pytest.mark.parametrize("devices", [1, 8])
def test_a_slice_is_refreshed_in_place(devices):
    mesh = partitioning.make_mesh(EIGHT if devices == 8 else MeshConfig(), jax.devices()[:devices])
    index = made_index(mesh, quantized(clustered(ROWS)))
    old = jax.tree.map(np.array, index.embeddings_ne)
    rows_r = (np.arange(300, dtype=np.int32) + ROWS - 150) % ROWS
    fresh = clustered(ROWS, seed=2)
    refresh = jax.jit(
        functools.partial(
            refresh_rows, lambda params, tokens: params[tokens[:, 0]], batch_size=64, mesh=mesh
        ),
        donate_argnums=1,
        out_shardings=rows_sharding(mesh),
    )
    args = (fresh, index.embeddings_ne, index.retriever_tokens_nm, rows_r)
    compiled = refresh.lower(*args).compile()
    new = jax.device_get(refresh(*args))
    assert isinstance(new, Int8Rows)
    want = jax.tree.map(np.array, old)
    want[rows_r] = fresh[rows_r]
    assert_same_rows(new, want)
    shard_bytes = (old.values_ne.nbytes + old.scales_n.nbytes) // devices
    assert compiled.memory_analysis().alias_size_in_bytes >= shard_bytes


@pytest.mark.parametrize("config", [MeshConfig(data=1), MeshConfig(data=8)])
def test_files_and_devices_hold_the_same_rows(make_store, tmp_path, config):  # noqa: F811
    store, floats = make_store(), embeddings(30)
    with new_index(tmp_path / "index", store, "enc", 8, "float32") as out_ne:
        out_ne[:] = floats
    with new_index(tmp_path / "index", store, "enc", 8, "int8", version=2) as out_ne:
        for start in range(0, 30, 7):
            out_ne[start : start + 7] = floats[start : start + 7]
    got = load_index(tmp_path / "index", store, "enc")
    assert got.version == 2 and isinstance(got.embeddings_ne.values_ne, Rows)
    assert_same_rows(got.embeddings_ne, quantized(floats))
    names = sorted(path.name for path in (tmp_path / "index").glob("embeddings-*/*"))
    assert names == ["rows", "scales"]  # the float32 rows are gone
    mesh = partitioning.make_mesh(config, jax.devices()[: config.data])
    index = to_device(got.embeddings_ne, store, mesh)
    layout = embeddings_layout(30, 8, "int8", mesh)
    for array, shape in zip(
        jax.tree.leaves(index.embeddings_ne), jax.tree.leaves(layout), strict=True
    ):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
        assert array.sharding.is_equivalent_to(shape.sharding, array.ndim)
        assert not np.asarray(array[30:]).any()
    save_index(tmp_path / "again", index.embeddings_ne, store, "enc")
    assert_same_rows(load_index(tmp_path / "again", store, "enc").embeddings_ne, got.embeddings_ne)


def test_lost_scales_are_named(make_store, tmp_path):  # noqa: F811
    store, folder = make_store(), tmp_path / "index"
    save_index(folder, quantized(embeddings(30)), store, "enc")
    (array,) = folder.glob("*/scales/zarr.json")
    array.write_text(array.read_text().replace('"shape":[30]', '"shape":[29]'))
    with pytest.raises(UserError, match=r"'float32' \[29\] instead of .* \[30\].*build_index"):
        load_index(folder, store, "enc")
    named = json.loads((folder / "index.json").read_text())["dtype"]
    assert named == "int8"


def test_a_checkpoint_holds_them_for_any_number_of_devices(tmp_path):
    layouts = [
        embeddings_layout(200, 4, "int8", partitioning.make_mesh(MeshConfig(), jax.devices()[:n]))
        for n in (8, 1)
    ]
    want = stored_as(embeddings(200, e=4), "int8")
    padded = jax.tree.map(lambda a: np.pad(a, [(0, 824), *[(0, 0)] * (a.ndim - 1)]), want)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layouts[0])
    saver = Checkpointer(tmp_path, CheckpointConfig())
    saver.save(3, {"step": jnp.int32(3)}, {}, index=jax.device_put(padded, shardings))
    for layout in layouts:
        found = saver.restore_index(3, layout)
        assert isinstance(found, Int8Rows)
        for got, expected, shape in zip(*map(jax.tree.leaves, (found, want, layout)), strict=True):
            assert got.sharding.is_equivalent_to(shape.sharding, got.ndim)
            np.testing.assert_array_equal(got[:200], expected)
            assert not np.asarray(got[200:]).any()
    saver.close()
