"""A reader with Switch layers: cached decoding, remat, and that it is written as no plain T5."""

from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.interop.t5_names import huggingface_names
from atlas_jax.reader.generate import GenerationConfig, generate
from atlas_jax.reader.t5 import T5
from tests.reader.small import config, passages, random_params

TOKENS, _ = passages()
SOURCE = TOKENS.reshape(3, -1)
# With places for all tokens, a whole target is read as its tokens are one by one.
ROOMY = config(num_experts=3, expert_every=1, eval_capacity_factor=3.0)


def test_cached_decoding_goes_through_the_experts_of_whole_targets() -> None:
    model = T5(ROOMY)
    params = random_params(model, seed=2)

    @jax.jit
    def decode(params: Any) -> Any:
        encoded = model.apply({"params": params}, SOURCE, method="encode")
        settings = GenerationConfig(max_length=8, eos_id=999)
        return generate(model, params, encoded, SOURCE > 0, settings, jax.random.key(0))

    tokens, scores = (np.asarray(x) for x in decode(params)[:2])
    inputs = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    logits = jax.jit(model.apply)({"params": params}, SOURCE, inputs)
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    np.testing.assert_array_equal(logprobs.argmax(-1), tokens)
    np.testing.assert_allclose(logprobs.max(-1).sum(-1), scores, atol=1e-4)


def test_rematerialised_layers_give_the_same_gradient() -> None:
    def gradient(policy: str) -> Any:
        model = T5(config(num_experts=3, remat_policy=policy, dropout_rate=0.0))
        params = random_params(model, seed=2)

        def loss(params: Any) -> jax.Array:
            logits: jax.Array = model.apply({"params": params}, SOURCE, SOURCE[:, :4])
            return logits.sum()

        return jax.jit(jax.grad(loss))(params)

    plain, again = gradient("none"), gradient("full")
    router = plain["encoder"]["layers_1"]["mlp"]["router"]["router_weights"]["w"]["kernel"]
    assert "wi_0" in plain["encoder"]["layers_0"]["mlp"] and np.abs(router).max() > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, again)


def test_a_reader_with_experts_is_no_t5_of_hugging_face() -> None:
    with pytest.raises(UserError, match="this reader has 3 experts in a layer"):
        huggingface_names(vars(ROOMY))
