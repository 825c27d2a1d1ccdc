"""ALBERT: its published sizes, and sharing against copies of the same weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from atlas_jax.core import partitioning
from atlas_jax.core.config import load_gin
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.encoders.albert import AlbertConfig, AlbertEncoder
from atlas_jax.encoders.bert import BertConfig, BertEncoder
from atlas_jax.encoders.heads import MlmHead, Pooler, SentenceHead
from atlas_jax.encoders.registry import make_encoder
from atlas_jax.from_gin import told
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import DualEncoder

SMALL = AlbertConfig(
    vocab_size=40, hidden_dim=16, num_layers=2, num_heads=2, mlp_dim=32, max_positions=16,
    factor_dim=8,
)  # fmt: skip
TOKENS = jnp.array([[2, 7, 9, 11, 0], [2, 30, 0, 0, 0]])
KINDS: dict[str, dict[str, Any]] = {
    "all": {}, "2 groups of 2": {"num_groups": 2, "inner_groups": 2},
    "attention": {"sharing": "attention"}, "ffn": {"sharing": "ffn"}, "none": {"sharing": "none"},
}  # fmt: skip


def size(module: Any, *args: Any) -> int:
    fresh = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))
    return sum(leaf.size for leaf in jax.tree.leaves(fresh))


# The paper's table 1 rounds them; computed by hand from the shapes (12 M, 18 M, 60 M, 235 M
# with another embedding size there), blocks and BERTs of the same shape likewise.
@pytest.mark.parametrize(
    ("name", "count", "block", "bert"),
    [
        ("base", 11_683_584, 7_087_872, 109_081_344),
        ("large", 17_683_968, 12_596_224, 334_607_360),
        ("xlarge", 58_724_864, 50_358_272, 1_275_291_648),
        ("xxlarge", 222_595_584, 201_379_840, 2_558_332_928),
    ],
)
def test_published_sizes(name: str, count: int, block: int, bert: int) -> None:
    load_gin([f"encoders/albert_{name}.gin"], [])
    config: Any = told(RetrieverConfig).tower
    assert isinstance(config, AlbertConfig)
    assert config.dropout_rate == 0.0, "ALBERT v2 has no dropout in its encoder"
    tokens, states = jnp.ones((1, 4), int), jnp.ones((1, 4, config.hidden_dim))
    pooler = size(Pooler(config), states)
    shallow = dataclasses.replace(config, num_layers=1)  # all layers are the same
    assert size(make_encoder(shallow), tokens) + pooler == count
    groups = dataclasses.replace(config, num_groups=2, num_layers=2)
    assert size(make_encoder(groups), tokens) + pooler == count + block
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(BertConfig)}
    one, two = (size(BertEncoder(BertConfig(**shared | {"num_layers": n})), tokens) for n in (1, 2))
    assert one + (config.num_layers - 1) * (two - one) + pooler == bert
    if name == "base":
        table = jnp.ones((config.vocab_size, config.factor_dim))
        heads = size(MlmHead(config), states, table) + size(SentenceHead(config), states) - pooler
        assert heads == 130_226


def unshared(config: AlbertConfig, params: Any) -> Any:
    """The parameters of a model of the same depth that shares nothing."""
    copies = {k: v for k, v in params.items() if k.startswith("embedding")}
    depth = 0
    for i in range(config.num_layers):
        if config.sharing == "all":
            group = params[f"groups_{config.group_of(i)}"]
            blocks = [group[f"layers_{j}"] for j in range(config.inner_groups)]
        else:
            blocks = [params[f"layers_{i}"] | params.get("shared", {})]
        for block in blocks:
            copies[f"layers_{depth}"] = block
            depth += 1
    return copies


@pytest.mark.parametrize(
    ("kind", "scan"),
    [*((kind, False) for kind in KINDS), ("2 groups of 2", True), ("attention", True)],
)
def test_a_shared_model_is_an_unshared_one_with_copied_weights(kind: str, scan: bool) -> None:
    config = dataclasses.replace(
        SMALL, **KINDS[kind], scan_layers=scan, remat_policy="full" if scan else "none"
    )
    model = AlbertEncoder(config)
    params = meta.unbox(AlbertEncoder(config).init(jax.random.key(0), TOKENS)["params"])
    params = jax.tree.map(lambda x: x + 0.1, params)  # biases and norms away from 0 and 1
    plain = dataclasses.replace(
        SMALL, sharing="none", num_layers=SMALL.num_layers * config.inner_groups
    )

    def loss(encoder: Any, params: Any) -> jax.Array:
        states_bld = encoder.apply({"params": params}, TOKENS)
        return jnp.sum(jnp.where((TOKENS > 0)[..., None], jnp.sin(states_bld), 0.0))

    ours, grads = jax.jit(jax.value_and_grad(lambda p: loss(model, p)))(params)
    expected, summed = jax.jit(
        jax.value_and_grad(lambda p: loss(AlbertEncoder(plain), unshared(config, p)))
    )(params)  # the derivative of copying is the sum over the copies
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, summed)
    every = model.apply({"params": params}, TOKENS, method="all_states")
    assert len(every) == config.num_layers + 1
    np.testing.assert_array_equal(every[-1], model.apply({"params": params}, TOKENS))


def test_factorised_tables_with_the_identity_behind_them_are_plain_ones() -> None:
    config = dataclasses.replace(SMALL, factor_dim=16, sharing="none")
    params = meta.unbox(AlbertEncoder(config).init(jax.random.key(0), TOKENS)["params"])
    params["embedding_projection"] = {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}
    ours = AlbertEncoder(config).apply({"params": params}, TOKENS)
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(BertConfig)}
    del params["embedding_projection"]
    plain = BertEncoder(BertConfig(**shared)).apply({"params": params}, TOKENS)
    np.testing.assert_allclose(ours, plain, atol=1e-6)


@pytest.mark.parametrize("kind", ["2 groups of 2", "ffn"])
def test_each_use_of_shared_weights_has_dropout_of_its_own(kind: str) -> None:
    config = dataclasses.replace(SMALL, **KINDS[kind], dropout_rate=0.5, scan_layers=True)
    for scan in (False, True):
        model = AlbertEncoder(dataclasses.replace(config, scan_layers=scan))
        params = model.init(jax.random.key(0), TOKENS)
        run = jax.jit(lambda key, model=model, params=params: model.apply(
            params, TOKENS, False, rngs={"dropout": key}))  # fmt: skip
        first, second, again = (run(jax.random.key(number)) for number in (1, 2, 1))
        np.testing.assert_array_equal(first, again)
        assert not np.allclose(first, second)


def test_an_albert_retriever_on_eight_devices_is_the_one_on_one() -> None:
    options = {"factor_dim": 8, "num_groups": 2}
    config = RetrieverConfig(
        vocab_size=40, hidden_dim=16, num_layers=2, num_heads=2, mlp_dim=32, max_positions=16,
        dropout_rate=0.0, encoder="albert", encoder_options=options, scan_layers=True,
    )  # fmt: skip
    model = DualEncoder(config)
    tokens = jnp.tile(TOKENS, (4, 1))
    boxed = model.init(jax.random.key(0), tokens, tokens)["params"]
    params = meta.unbox(boxed)

    def loss(params: Any) -> jax.Array:
        return jnp.sum(model.apply({"params": params}, tokens, method="embed_query") ** 2)

    expected = jax.jit(jax.value_and_grad(loss))(params)
    mesh = partitioning.make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    rules = partitioning.STANDARD_RULES
    with partitioning.activate(mesh, rules):
        shardings = partitioning.param_shardings(boxed, mesh, rules)
        placed = jax.device_put(params, shardings)
        kernel = placed["encoder"]["groups_1"]["layers_0"]["intermediate"]["kernel"]
        assert len({str(shard.index) for shard in kernel.addressable_shards}) == 4
        found = jax.jit(jax.value_and_grad(loss))(placed)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sharing": "some"}, "AlbertConfig.sharing = 'some': must be one of none, attention"),
        ({"num_groups": 5}, "num_groups = 5: at most num_layers = 2"),
        ({"sharing": "ffn", "num_groups": 2}, "num_groups = 2 .* are for sharing = 'all'"),
        ({"factor_dim": 0}, "AlbertConfig.factor_dim = 0: expected a whole number from 1"),
    ],
)
def test_what_no_albert_has_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **fields)
