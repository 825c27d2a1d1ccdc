"""The softmax of attention: JAX's, with a derivative that keeps one array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core.layers import softmax

LOGITS = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32) * 4
WEIGHTS = np.random.default_rng(1).normal(size=LOGITS.shape)


def test_its_values_are_jax_s_to_the_bit() -> None:
    np.testing.assert_array_equal(softmax(LOGITS), jax.nn.softmax(LOGITS, axis=-1))


@pytest.mark.parametrize("masked", [0, 3])
def test_its_gradient_is_that_of_the_formula(masked: int) -> None:
    """d/dx_i sum_j w_j p_j = p_i (w_i - sum_j w_j p_j), in float64."""
    logits = LOGITS.copy()
    logits[..., :masked] = -1e10
    got = jax.grad(lambda x: jnp.sum(softmax(x) * WEIGHTS))(logits)
    exp = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    probs = exp / exp.sum(-1, keepdims=True)
    expected = probs * (WEIGHTS - (probs * WEIGHTS).sum(-1, keepdims=True))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert not got[..., :masked].any()


def test_one_array_is_kept_for_the_backward_pass() -> None:
    def kept(function: object) -> int:
        _, backward = jax.vjp(function, jnp.asarray(LOGITS))  # type: ignore[arg-type]
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept(softmax) == LOGITS.size
    assert kept(jax.nn.softmax) > LOGITS.size  # else `softmax` has no reason to be
