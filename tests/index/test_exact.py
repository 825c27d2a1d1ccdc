"""Exact search: against NumPy, one device against eight, and what the compiled form moves."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig, activate, make_mesh
from atlas_jax.core.types import NO_ROW, DeviceIndex
from atlas_jax.index.exact import ExactSearcher, exact_search, gather_passages, top_k_rows
from atlas_jax.index.placement import rows_sharding
from atlas_jax.index.search import SearchResult

SLICES = MeshConfig(data=2, model=2, dcn=2)
MESHES = [MeshConfig(data=4, model=2), MeshConfig(2, 2, 2), MeshConfig(data=8), SLICES]


def make_index(n=1024, e=16, count=None, seed=0, dtype=np.float32, integers=False):
    """A random index; ``integers`` gives small whole numbers, so scores tie often."""
    rng = np.random.default_rng(seed)
    embeddings_ne = rng.standard_normal((n, e)).astype(np.float32)
    if integers:
        embeddings_ne = rng.integers(-1, 2, (n, e)).astype(np.float32)
    return DeviceIndex(
        embeddings_ne=jnp.asarray(embeddings_ne, dtype),
        reader_tokens_nl=jnp.asarray(rng.integers(1, 60000, (n, 5)), jnp.uint16),
        retriever_tokens_nm=jnp.asarray(rng.integers(1, 90000, (n, 3)), jnp.int32),
        count=jnp.int32(n if count is None else count),
        version=jnp.int32(0),
    )


def place(index, mesh):
    every, whole = rows_sharding(mesh), jax.sharding.NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.device_put(x, every if x.ndim else whole), index)


def reference(index, query_be, k, excluded_bx=None):
    """NumPy: stable sort of all scores, so ties go to the lower row."""
    scores_bn = np.asarray(query_be) @ np.asarray(index.embeddings_ne, np.float32).T
    scores_bn[:, int(index.count) :] = -np.inf
    if excluded_bx is not None:
        for b, rows in enumerate(excluded_bx):
            scores_bn[b, [row for row in rows if row >= 0]] = -np.inf
    rows_bk = np.argsort(-scores_bn, axis=1, kind="stable")[:, :k]
    scores_bk = np.take_along_axis(scores_bn, rows_bk, axis=1)
    return np.where(np.isneginf(scores_bk), NO_ROW, rows_bk), scores_bk


def queries(b=6, e=16, seed=1, integers=False):
    rng = np.random.default_rng(seed)
    if integers:
        return rng.integers(-1, 2, (b, e)).astype(np.float32)
    return rng.standard_normal((b, e)).astype(np.float32)


@pytest.mark.parametrize(("k", "integers"), [(1, False), (5, True), (300, False), (300, True)])
def test_matches_numpy_with_ties_to_the_lower_row(k, integers):
    index, query_be = make_index(count=1000, integers=integers), queries(integers=integers)
    got = exact_search(index, query_be, k)
    rows_bk, scores_bk = reference(index, query_be, k)
    np.testing.assert_array_equal(got.rows_bk, rows_bk)
    np.testing.assert_allclose(got.scores_bk, scores_bk, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "k"), [(4096, 3), (4096, 64), (4100, 7), (4095, 7), (4096, 4096)])
def test_two_stage_selection_is_top_k(n, k):
    scores_bn = np.random.default_rng(n + k).integers(0, 50, (4, n)).astype(np.float32)
    select = jax.jit(top_k_rows, static_argnames="k")
    for count in (n, n - 1, n - 64, n - 100, 96, 0, -200):  # below 0: a shard of padding alone
        masked_bn = np.where(np.arange(n) < count, scores_bn, -np.inf)
        rows_bk = np.argsort(-masked_bn, axis=1, kind="stable")[:, :k]
        top_bk, at_bk = select(scores_bn, k=k, count=count)
        np.testing.assert_array_equal(top_bk, np.take_along_axis(masked_bn, rows_bk, axis=1))
        real = min(k, max(count, 0))
        np.testing.assert_array_equal(at_bk[:, :real], rows_bk[:, :real])


def test_two_stage_selection_looks_at_blocks_only():
    """Its second stage sorts k blocks, not all n rows."""
    text = jax.jit(top_k_rows, static_argnums=1).lower(jnp.zeros((2, 65536)), 8, 65536).as_text()
    sizes = [int(n) for n in re.findall(r"top_k\(.*?tensor<2x(\d+)xf32>", text)]
    assert sizes and max(sizes) <= 65536 // 32


@pytest.mark.parametrize("config", MESHES)
@pytest.mark.parametrize(("k", "integers"), [(3, False), (100, True), (200, True)])
def test_eight_devices_equal_one(config, k, integers):
    """k=200 is above the 128 rows that each device holds."""
    mesh = make_mesh(config)
    index, query_be = make_index(count=1001, integers=integers), queries(integers=integers)
    excluded_bx = reference(index, query_be, 4)[0][:, 1:].astype(np.int32)
    excluded_bx[0] = NO_ROW
    one = exact_search(index, query_be, k, excluded_bx)
    spread = jax.jit(exact_search, static_argnames=("k", "mesh"))(
        place(index, mesh), query_be, k=k, excluded_bx=excluded_bx, mesh=mesh
    )
    np.testing.assert_array_equal(spread.rows_bk, one.rows_bk)
    np.testing.assert_allclose(spread.scores_bk, one.scores_bk, rtol=1e-6)
    np.testing.assert_array_equal(one.rows_bk, reference(index, query_be, k, excluded_bx)[0])


def test_active_mesh_is_the_default():
    mesh = make_mesh(MESHES[0])
    index, query_be = make_index(), queries()
    with activate(mesh):
        spread = ExactSearcher(place(index, mesh)).search(query_be, 5)
    np.testing.assert_array_equal(spread.rows_bk, reference(index, query_be, 5)[0])
    assert spread.rows_bk.sharding.is_fully_replicated


def test_no_collective_moves_the_index():
    """Compiled, each device holds n/8 rows and every collective is small."""
    mesh = make_mesh(MESHES[0])
    n, e, b, k = 8192, 32, 4, 6
    index = place(make_index(n=n, e=e), mesh)

    def retrieve(index, query_be):
        return gather_passages(index, exact_search(index, query_be, k, mesh=mesh), mesh)

    text = jax.jit(retrieve).lower(index, queries(b, e)).compile().as_text()
    assert re.search(rf"f32\[{n // 8},{e}\]\S* parameter", text)
    assert not re.search(rf"\[{n},", text)
    moved = re.findall(
        r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)\S*\(", text
    )
    shapes = [shape for line in moved for shape in re.findall(r"\[([\d,]*)\]", line)]
    sizes = [int(np.prod([int(d) for d in shape.split(",") if d] or [1])) for shape in shapes]
    assert sizes and max(sizes) <= 8 * b * k * 5  # eight shards' candidates, or b*k*l tokens


def test_a_search_stays_on_its_slice():
    """Of two slices each has the whole index, and asks it for its own half of the queries."""
    mesh = make_mesh(SLICES)
    index, query_be = place(make_index(), mesh), queries(8)
    assert {shard.data.shape for shard in index.embeddings_ne.addressable_shards} == {(256, 16)}
    rows = NamedSharding(mesh, PartitionSpec(("dcn", "data")))

    def retrieve(index, query_be):
        return gather_passages(index, exact_search(index, query_be, 6, mesh=mesh), mesh)

    compiled = jax.jit(retrieve, in_shardings=(None, rows)).lower(index, query_be).compile()
    text = compiled.as_text()
    scored = re.findall(r"f32\[(\d+),256\]\S* dot\(", text)
    assert scored and set(scored) == {"4"}
    found = re.findall(r"replica_groups=(.*?), [a-z_]+=", text)
    assert found and "collective-permute" not in text
    for groups in map(replica_groups, found):
        assert all({device // 4 for device in group} in ({0}, {1}) for group in groups), groups


def replica_groups(text):
    """Of a collective: {{0,1},{2,3}}, or [groups,size]<=[dims]T(permutation)."""
    numbers = lambda part: [int(n) for n in part.split(",")]  # noqa: E731
    short = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if short is None:
        return [numbers(group) for group in re.findall(r"\{([\d,]+)\}", text)]
    dims = numbers(short[2])
    order = numbers(short[3]) if short[3] else range(len(dims))
    devices = np.arange(np.prod(dims)).reshape(dims).transpose(order)
    return devices.reshape(numbers(short[1])).tolist()


@pytest.mark.parametrize("config", [None, MESHES[0]])
def test_approximate_selection_keeps_what_the_exact_one_promises(config):
    """Off a TPU it selects exactly, so all of it can be compared: padding, exclusion, shards."""
    mesh = config and make_mesh(config)
    index, query_be = make_index(count=1000), queries()
    excluded_bx = reference(index, query_be, 2)[0]
    placed = place(index, mesh) if mesh else index
    search = jax.jit(functools.partial(exact_search, k=9, mesh=mesh, recall_target=0.95))
    found = search(placed, query_be, excluded_bx=excluded_bx)
    np.testing.assert_array_equal(found.rows_bk, reference(index, query_be, 9, excluded_bx)[0])


def test_a_recall_target_below_1_selects_with_the_approximate_primitive():
    index, query_be = make_index(), queries()
    for target, used in ((1.0, False), (0.95, True)):
        traced = jax.make_jaxpr(functools.partial(exact_search, k=9, recall_target=target))(
            index, query_be
        )
        assert ("approx_top_k" in str(traced)) == used


def test_padding_rows_are_never_returned():
    """Every real score is negative, padding would score 0."""
    index = make_index(n=256, count=200)
    padded_ne = -jnp.abs(index.embeddings_ne) * (jnp.arange(256)[:, None] < 200).astype(jnp.float32)
    index = index.replace(embeddings_ne=padded_ne)
    got = exact_search(index, np.ones((2, 16), np.float32), 200)
    assert set(np.asarray(got.rows_bk[0])) == set(range(200))


def test_exclusion_still_gives_k_rows_while_there_are_any():
    index, query_be = make_index(n=16, e=4), queries(2, 4)
    everything = np.argsort(-(query_be @ np.asarray(index.embeddings_ne).T), axis=1)
    excluded_bx = everything[:, :6].astype(np.int32)
    got = exact_search(index, query_be, 12, excluded_bx)
    np.testing.assert_array_equal(got.rows_bk[:, :10], everything[:, 6:])
    np.testing.assert_array_equal(got.rows_bk[:, 10:], NO_ROW)
    assert np.isneginf(got.scores_bk[:, 10:]).all()


def test_bfloat16_index_scores_in_float32():
    index, query_be = make_index(dtype=jnp.bfloat16), queries()
    got = exact_search(index, query_be, 10)
    rounded_be = np.asarray(jnp.asarray(query_be, jnp.bfloat16), np.float32)
    assert got.scores_bk.dtype == jnp.float32
    np.testing.assert_allclose(got.scores_bk, reference(index, rounded_be, 10)[1], rtol=1e-5)


def test_no_gradient_flows_through_search():
    index = make_index()
    grad = jax.grad(lambda q: exact_search(index, q, 3).scores_bk.sum())(queries())
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("config", [None, *MESHES])
def test_gather_passages_takes_the_rows(config):
    mesh = make_mesh(config) if config else None
    index = make_index()
    placed = place(index, mesh) if mesh else index
    rows_bk = np.array([[0, 1023, 512], [127, NO_ROW, 128]], np.int32)
    result = SearchResult(rows_bk=jnp.asarray(rows_bk), scores_bk=jnp.zeros((2, 3)))
    got = jax.jit(gather_passages, static_argnames="mesh")(placed, result, mesh=mesh)
    want = np.asarray(index.reader_tokens_nl).astype(np.int32)[rows_bk]
    want[1, 1] = 0
    assert got.reader_tokens_bkl.dtype == jnp.int32
    np.testing.assert_array_equal(got.reader_tokens_bkl, want)
    want = np.asarray(index.retriever_tokens_nm)[rows_bk]
    want[1, 1] = 0
    np.testing.assert_array_equal(got.retriever_tokens_bkm, want)
    np.testing.assert_array_equal(got.mask_bk, rows_bk != NO_ROW)


@pytest.mark.parametrize("k", [0, 101])
def test_k_out_of_range_is_an_error(k):
    index = make_index(n=128, count=100)
    with pytest.raises(UserError, match=f"k={k}"):
        exact_search(index, queries(), k)
    with pytest.raises(UserError, match=f"k={k}"):
        ExactSearcher(index).search(queries(), k)


def test_rows_that_do_not_divide_are_an_error():
    with pytest.raises(ValueError, match="100 index rows .* 8 devices"):
        exact_search(make_index(n=100), queries(), 3, mesh=make_mesh(MESHES[0]))
