"""Rows of a device index embedded anew: the right ones, in place, on any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core import partitioning
from atlas_jax.core.partitioning import STANDARD_RULES, MeshConfig
from atlas_jax.index.placement import rows_sharding
from atlas_jax.index.rolling import embed_tokens, refresh_rows
from tests.training.models import random_index, tiny_models

MESHES = {"one": (MeshConfig(1, 1, 1), 1), "eight": (MeshConfig(data=2, fsdp=2, model=2), 8)}
ROWS = 1024


def made(mesh, rows_r, batch_size=64):
    """The old embeddings, those after the refresh, and what the tower gives for every row."""
    retriever = tiny_models().retriever
    tower = lambda params, tokens: retriever.apply(  # noqa: E731
        {"params": params}, tokens, method="embed_passage"
    )
    with partitioning.activate(mesh, STANDARD_RULES):
        index = random_index(mesh, rows=ROWS)
        old_ne = np.array(index.embeddings_ne)
        tokens = jnp.asarray(np.asarray(index.retriever_tokens_nm), jnp.int32)
        params = jax.jit(retriever.init)(jax.random.key(0), tokens[:8], tokens[:8])["params"]
        params = jax.device_get(params)
        refresh = jax.jit(
            functools.partial(refresh_rows, tower, batch_size=batch_size, mesh=mesh),
            donate_argnums=1,
            out_shardings=rows_sharding(mesh),
        )
        args = (params, index.embeddings_ne, index.retriever_tokens_nm, rows_r)
        compiled = refresh.lower(*args).compile()
        new_ne = np.asarray(refresh(*args))
        expected_ne = np.asarray(jax.jit(tower)(params, tokens))
    return old_ne, new_ne, expected_ne, compiled


@pytest.mark.parametrize("name", MESHES)
def test_just_these_rows_become_what_the_tower_gives(name):
    config, devices = MESHES[name]
    mesh = partitioning.make_mesh(config, jax.devices()[:devices])
    rows_r = (np.arange(100, dtype=np.int32) + 980) % ROWS  # over the end, and two shards
    old_ne, new_ne, expected_ne, compiled = made(mesh, rows_r)
    kept = np.setdiff1d(np.arange(ROWS), rows_r)
    np.testing.assert_array_equal(new_ne[kept], old_ne[kept])
    np.testing.assert_allclose(new_ne[rows_r], expected_ne[rows_r], rtol=1e-4, atol=1e-5)
    assert np.abs(new_ne[rows_r] - old_ne[rows_r]).max() > 0.1
    # In place: the donated embeddings are the result's memory ...
    shard_bytes = old_ne.nbytes // devices
    assert compiled.memory_analysis().alias_size_in_bytes >= shard_bytes
    if devices > 1:  # ... and no device ever sees an array with all the rows.
        assert f"[{ROWS // devices}," in compiled.as_text()
        assert f"[{ROWS}," not in compiled.as_text()


@pytest.mark.parametrize("batch_size", [3, 7, 8, 16])
def test_batches_of_any_size_give_the_same_embeddings(batch_size):
    tokens = jnp.arange(24).reshape(8, 3)
    largest = []

    def tower(params, tokens_nm):
        largest.append(len(tokens_nm))
        return tokens_nm.astype(jnp.float32) * params

    got = embed_tokens(tower, jnp.float32(2), tokens, batch_size)
    np.testing.assert_array_equal(got, tokens * 2)
    assert max(largest) <= batch_size
