"""A BERT and its relatives with fused attention, its kernels interpreted, against XLA's."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from atlas_jax.core.errors import UserError
from atlas_jax.encoders.albert import AlbertConfig
from atlas_jax.encoders.bert import BertConfig
from atlas_jax.encoders.registry import make_encoder
from atlas_jax.encoders.xlnet import XlnetConfig
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import DualEncoder

SIZES: dict[str, Any] = {
    "vocab_size": 30, "hidden_dim": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 24,
    "max_positions": 20,
}  # fmt: skip
LENGTHS = np.array([20, 1, 7, 13, 0])
TOKENS = np.random.default_rng(0).integers(1, 30, (5, 20)).astype(np.int32)
TOKENS *= np.arange(20) < LENGTHS[:, None]


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grad(config: Any, params: Any) -> Any:
    def loss(params: Any) -> Any:
        rngs = {"dropout": jax.random.key(2)}
        states = make_encoder(config).apply({"params": params}, TOKENS, False, rngs=rngs)
        states = jnp.where((TOKENS != 0)[..., None], states, 0.0)
        return jnp.sum(states * jnp.sin(jnp.arange(states.size).reshape(states.shape))), states

    return jax.grad(loss, has_aux=True)(params)


@pytest.mark.parametrize(
    "config",
    [BertConfig(**SIZES, scan_layers=True, remat_policy="full"), AlbertConfig(**SIZES)],
    ids=["bert", "albert"],
)
def test_it_trains_the_same(config: Any) -> None:
    """Dropout draws the same for the probabilities and, fused, for the values."""
    config = dataclasses.replace(config, dropout_rate=0.2)
    params = meta.unbox(make_encoder(config).init(jax.random.key(0), TOKENS))["params"]
    params = jax.tree.map(lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    expected = loss_and_grad(config, params)
    found = loss_and_grad(dataclasses.replace(config, attention="fused"), params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


def test_a_retriever_embeds_the_same() -> None:
    plain, fused = (
        DualEncoder(RetrieverConfig(**SIZES, attention=kind)) for kind in ("xla", "fused")
    )
    real = TOKENS[:4]  # the mean of no tokens means nothing
    params = plain.init(jax.random.key(0), real, method="embed_passage")
    expected = plain.apply(params, real, method="embed_passage")
    found = fused.apply(params, real, method="embed_passage")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert fused.config.tower.output_fields() == plain.config.tower.output_fields()


def test_what_hides_some_keys_from_some_positions_is_refused() -> None:
    encoder = make_encoder(BertConfig(**SIZES, attention="fused"))
    mask = np.ones((5, 20, 20), bool)
    with pytest.raises(UserError, match="BertConfig.attention = 'fused' reads the same keys"):
        jax.eval_shape(lambda: encoder.init(jax.random.key(0), TOKENS, mask=mask))


def test_an_xlnet_is_refused() -> None:
    with pytest.raises(UserError, match="XlnetConfig.attention = 'fused': must be 'xla'"):
        XlnetConfig(**SIZES, attention="fused")
