"""Passages that share rows are embedded as each in a row of its own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core import partitioning
from atlas_jax.core.packing import pack, rows_needed
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.models.towers import embed_passages
from atlas_jax.retriever.dual_encoder import DualEncoder
from tests.retriever.test_dual_encoder import init, model

B, K, LENGTH = 8, 6, 12
# Empty passages, one token, full rows, more than half a row; then lengths drawn at random.
LENGTHS = np.random.default_rng(0).integers(0, LENGTH // 2, (B, K))
LENGTHS[:4] = [
    [3, 2, 5, 12, 1, 7],
    [12, 12, 1, 11, 0, 0],
    [0, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 1, 1],
]
ROWS = int(jax.jit(rows_needed, static_argnums=1)(LENGTHS, LENGTH).max())
TOKENS = np.where(
    np.arange(LENGTH) < LENGTHS[..., None],
    np.random.default_rng(1).integers(1, 40, (B, K, LENGTH)),
    0,
).astype(np.int32)
TOKENS[0, 3, 4:6] = 0  # padding inside a passage
KINDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "scanned": {"scan_layers": True, "remat_policy": "full", "num_layers": 2},
    "untied": {"tied": False, "normalize": True, "pooling": "sqrt"},
    "fused": {"attention": "fused"},
    "albert": {"encoder": "albert", "encoder_options": {"factor_dim": 8}},
    "roberta": {"encoder": "roberta", "pooling": "cls", "max_positions": 14},
    "electra": {"encoder": "electra", "encoder_options": {"factor_dim": 8}},
    "xlnet": {"encoder": "xlnet", "pooling": "cls"},
}


def both(module: DualEncoder, params: Any, tokens: Any, rows: int) -> Any:
    """Embeddings, and the gradients of a sum of them; rows = 0: padded."""
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((B, K, 16)), jnp.float32)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        given = pack(tokens, rows)[0] if rows else tokens
        x_bke = embed_passages(module, params, given)
        x_bke = jnp.where((tokens != 0).any(axis=-1, keepdims=True), x_bke, 0.0)
        return jnp.mean(x_bke * weights), x_bke

    return jax.value_and_grad(loss, has_aux=True)(params)


compiled = functools.partial(jax.jit, static_argnums=(0, 3))(both)


def assert_equal(ours: Any, theirs: Any, tolerance: float) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs
    )


@pytest.mark.parametrize("kind", KINDS)
def test_packed_passages_are_embedded_as_padded_ones(kind: str) -> None:
    module = model(**KINDS[kind])
    params = init(module)
    (total, ours), ours_grad = compiled(module, params, TOKENS, ROWS)
    (expected, theirs), theirs_grad = compiled(module, params, TOKENS, 0)
    assert np.abs(theirs).max() > 0.1
    assert_equal((total, ours), (expected, theirs), 1e-6)
    assert_equal(ours_grad, theirs_grad, 1e-5)


def test_eight_devices_embed_packed_passages_as_one() -> None:
    module = model(normalize=True)
    params = init(module)
    (_, theirs), theirs_grad = compiled(module, params, TOKENS, 0)
    mesh = partitioning.make_mesh(MeshConfig(data=4, model=2))
    with partitioning.activate(mesh):
        step = jax.jit(functools.partial(both, module), static_argnums=2)
        (_, ours), ours_grad = step(params, TOKENS, ROWS)
    assert_equal(ours, theirs, 1e-6)
    assert_equal(ours_grad, theirs_grad, 1e-5)
