"""Encoders by name: their configs, and which fields decide their output."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from atlas_jax.core.errors import UserError
from atlas_jax.core.experts import EXPERT_FIELDS
from atlas_jax.encoders.config import EncoderConfig
from atlas_jax.encoders.registry import ENCODERS, encoder_config, make_encoder
from atlas_jax.retriever.config import RetrieverConfig

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_dim": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 32,
    "max_positions": 16,
}  # fmt: skip
CHANGED: dict[str, Any] = {
    "vocab_size": 41, "hidden_dim": 8, "num_layers": 4, "num_heads": 4, "mlp_dim": 24,
    "max_positions": 17, "type_vocab_size": 3, "layer_norm_eps": 1e-6, "activation": "gelu_tanh",
    "released_layer_norm": True, "factor_dim": 8, "sharing": "none", "num_groups": 2,
    "inner_groups": 2, "position_offset": 1,
}  # fmt: skip

EXPERTS = {"num_experts": 3, "expert_every": 1, "eval_capacity_factor": 1.0}


def shapes(config: EncoderConfig) -> Any:
    """Names and shapes of an encoder's parameters."""
    init = make_encoder(config).init
    fresh = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 4), int))
    return jax.tree.map(jnp.shape, meta.unbox(fresh["params"]))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_field_that_changes_the_output_is_in_its_fingerprint(name: str) -> None:
    plain: Any = encoder_config(name, SMALL, {}, "RetrieverConfig")
    for field in dataclasses.fields(plain):
        if field.name in plain.NEUTRAL:
            assert field.name not in plain.output_fields()
            continue
        if field.name in EXPERT_FIELDS:
            if not plain.NO_EXPERTS:
                with_experts = dataclasses.replace(plain, num_experts=2)
                changed = dataclasses.replace(with_experts, **{field.name: EXPERTS[field.name]})
                differs = (
                    shapes(changed) != shapes(with_experts)
                    if field.name in plain.TOLD_BY_PARAMETERS
                    else changed.output_fields() != with_experts.output_fields()
                )
                assert differs, field.name
            continue
        value = CHANGED[field.name]
        if getattr(plain, field.name) == value:
            value = {"gelu_tanh": "gelu"}[value]
        changed = dataclasses.replace(plain, **{field.name: value})
        if field.name in plain.TOLD_BY_PARAMETERS:
            assert shapes(changed) != shapes(plain), field.name
        else:
            assert changed.output_fields() != plain.output_fields(), field.name


def test_a_retriever_names_its_encoder() -> None:
    plain = RetrieverConfig(**SMALL, released_layer_norm=True).tower
    assert plain == ENCODERS["bert"].config(**SMALL, released_layer_norm=True)
    tanh = RetrieverConfig(**SMALL, encoder_options={"activation": "gelu_tanh"})
    assert tanh.tower.output_fields()["activation"] == "gelu_tanh"
    assert RetrieverConfig(**dataclasses.asdict(tanh)) == tanh  # as a model folder has it
    roberta = RetrieverConfig(**SMALL, encoder="roberta")
    assert (roberta.max_positions, roberta.max_length) == (16, 14)


def test_positions_begin_where_the_encoder_says() -> None:
    """A RoBERTa is the BERT whose position table lacks the rows that are never read."""
    roberta = make_encoder(encoder_config("roberta", SMALL, {}, "RetrieverConfig"))
    tokens = jnp.array([[1, 5, 9, 2, 0]])
    params = meta.unbox(roberta.init(jax.random.key(0), tokens)["params"])
    expected = roberta.apply({"params": params}, tokens)
    alike = {"max_positions": 14, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    bert = make_encoder(encoder_config("bert", {**SMALL, **alike}, {}, "Test"))
    table = params["embeddings"]["position_embeddings"]
    table["embedding"] = table["embedding"][2:]
    np.testing.assert_array_equal(bert.apply({"params": params}, tokens), expected)
    long = jnp.ones((1, 15), int)
    with pytest.raises(UserError, match=r"15 tokens, of at most 14.*RobertaConfig.max_positions"):
        roberta.apply({"params": params}, long)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": "bart"}, "RetrieverConfig.encoder = 'bart': must be one of bert, albert"),
        (
            {"encoder_options": {"depth": 3}},
            "RetrieverConfig.encoder_options: 'depth' is no option of the encoder 'bert'; "
            "it has activation, balance_weight, eval_capacity_factor, expert_every, initializer, ",
        ),
        ({"encoder_options": {"num_layers": 3}}, "'num_layers' is no option"),
        ({"encoder_options": {"activation": "relu"}}, "activation = 'relu': must be one of gelu"),
    ],
)
def test_what_does_not_fit_the_encoder_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RetrieverConfig(**SMALL, **fields)
