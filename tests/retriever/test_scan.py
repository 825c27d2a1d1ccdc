"""A scanned and rematerialised retriever is the plain one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import DualEncoder

PLAIN = RetrieverConfig(
    vocab_size=40, hidden_dim=16, num_layers=3, num_heads=2, mlp_dim=32, max_positions=16,
    dropout_rate=0.5,
)  # fmt: skip
TOKENS = jnp.array([[2, 7, 9, 11, 0], [2, 30, 0, 0, 0]])


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("policy", ["none", "minimal", "full"])
def test_embeddings_and_gradients_stay_the_same(scan: bool, policy: str) -> None:
    changed = DualEncoder(dataclasses.replace(PLAIN, scan_layers=scan, remat_policy=policy))
    plain = DualEncoder(PLAIN)
    params = plain.init(jax.random.key(0), TOKENS, TOKENS)
    shapes = jax.eval_shape(lambda: changed.init(jax.random.key(0), TOKENS, TOKENS))
    assert jax.tree.structure(shapes) == jax.tree.structure(params)  # stored alike

    def loss(model: DualEncoder) -> jax.Array:
        return lambda p: jnp.sum(model.apply(p, TOKENS, method="embed_query") ** 2)

    ours, theirs = jax.grad(loss(changed))(params), jax.grad(loss(plain))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


def test_a_scanned_retriever_drops_out_anew_in_each_layer_and_for_each_key() -> None:
    scanned = DualEncoder(dataclasses.replace(PLAIN, scan_layers=True, remat_policy="full"))
    params = scanned.init(jax.random.key(0), TOKENS, TOKENS)

    def embedded(key: int) -> np.ndarray:
        rngs = {"dropout": jax.random.key(key)}
        return np.asarray(scanned.apply(params, TOKENS, False, rngs=rngs, method="embed_query"))

    np.testing.assert_array_equal(embedded(1), embedded(1))
    assert not np.allclose(embedded(1), embedded(2))


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UserError, match="RetrieverConfig.remat_policy"):
        RetrieverConfig(remat_policy="half")
