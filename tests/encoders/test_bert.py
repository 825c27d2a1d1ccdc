"""BERT against Hugging Face: recorded numbers, and live where torch is installed."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from atlas_jax.core.errors import UserError
from atlas_jax.encoders.bert import BertConfig, BertEmbeddings, BertEncoder, gelu
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import DualEncoder, pool
from tests.goldens import make_bert_goldens as goldens

TOLERANCE = 1e-4
BATCHES = range(len(goldens.SHAPES))


def config(**changes: Any) -> BertConfig:
    return BertConfig(**{**goldens.CONFIG, "dropout_rate": 0.1, **changes})


def retriever_config(**changes: Any) -> RetrieverConfig:
    return RetrieverConfig(**{**goldens.CONFIG, "dropout_rate": 0.1, **changes})


def nested(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    return flax.traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(goldens.FILE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def params(golden: dict[str, np.ndarray]) -> dict[str, Any]:
    prefix = "params/"
    return nested({k[len(prefix) :]: v for k, v in golden.items() if k.startswith(prefix)})


@functools.cache
def _encoder(cfg: BertConfig) -> Callable[..., jax.Array]:
    return jax.jit(BertEncoder(cfg).apply)


def states(cfg: BertConfig, params: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    return np.asarray(_encoder(cfg)({"params": params}, tokens)) * (tokens != 0)[:, :, None]


@pytest.mark.parametrize("variant", ["standard", "released"])
@pytest.mark.parametrize("batch", BATCHES)
def test_hidden_states(
    golden: dict[str, np.ndarray], params: dict[str, Any], variant: str, batch: int
) -> None:
    cfg = config(released_layer_norm=variant == "released")
    ours = states(cfg, params, golden[f"tokens/{batch}"])
    np.testing.assert_allclose(ours, golden[f"{variant}/states/{batch}"], atol=TOLERANCE)


def test_the_two_layer_norms_differ(golden: dict[str, np.ndarray]) -> None:
    difference = np.abs(golden["standard/states/0"] - golden["released/states/0"]).max()
    assert difference > 100 * TOLERANCE


@pytest.mark.parametrize("pooling", ["average", "sqrt", "cls"])
def test_poolings(golden: dict[str, np.ndarray], params: dict[str, Any], pooling: str) -> None:
    for batch in BATCHES:
        pooled = pool(golden[f"standard/states/{batch}"], golden[f"tokens/{batch}"], pooling)
        np.testing.assert_allclose(pooled, golden[f"standard/{pooling}/{batch}"], atol=1e-5)
    apply = functools.partial(
        DualEncoder(retriever_config(pooling=pooling)).apply, method="embed_query"
    )
    ours = jax.jit(apply)({"params": {"encoder": params}}, golden["tokens/0"])
    np.testing.assert_allclose(ours, golden[f"standard/{pooling}/0"], atol=TOLERANCE)


def test_a_fresh_tree_has_the_golden_names_and_shapes(params: dict[str, Any]) -> None:
    fresh = jax.eval_shape(BertEncoder(config()).init, jax.random.key(0), jnp.ones((1, 4), int))
    shapes = jax.tree.map(jnp.shape, meta.unbox(fresh["params"]))
    assert shapes == jax.tree.map(jnp.shape, params)


@pytest.mark.parity
@pytest.mark.parametrize("released", [False, True])
def test_live_parity(released: bool) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = goldens.make_model(released)
    cfg = config(released_layer_norm=released)
    params = nested(goldens.to_tree(model.state_dict()))
    for tokens in goldens.random_tokens():
        expected = goldens.hidden_states(model, tokens)
        np.testing.assert_allclose(states(cfg, params, tokens), expected, atol=TOLERANCE)


def test_gelu_is_exact() -> None:
    x = np.linspace(-6, 6, 101)
    expected = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    np.testing.assert_allclose(gelu(jnp.asarray(x)), expected, atol=1e-6)


def test_padding_changes_nothing(params: dict[str, Any]) -> None:
    tokens = np.array([[5, 9, 3, 44]], np.int32)
    padded = np.pad(tokens, ((0, 0), (0, 9)))
    np.testing.assert_allclose(
        states(config(), params, padded)[:, :4], states(config(), params, tokens), atol=1e-5
    )


def test_bfloat16_stays_near_float32(golden: dict[str, np.ndarray], params: Any) -> None:
    tokens = golden["tokens/0"]
    model = DualEncoder(retriever_config(dtype="bfloat16"))
    embed = jax.jit(functools.partial(model.apply, method="embed_query"))
    rough = embed({"params": {"encoder": params}}, tokens)
    assert rough.dtype == jnp.float32, "embeddings are float32 whatever the activations are"
    error = np.abs(rough - golden["standard/average/0"]).max()
    assert 1e-5 < error < 0.1


def test_a_text_that_is_too_long_is_refused(params: dict[str, Any]) -> None:
    long = np.ones((1, 18), np.int32)
    with pytest.raises(UserError, match="18 tokens.*BertConfig.max_positions = 17"):
        states(config(), params, long)
    model = DualEncoder(retriever_config())
    with pytest.raises(UserError, match="18 tokens.*RetrieverConfig.max_positions = 17"):
        model.apply({"params": {"encoder": params}}, long, method="embed_query")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pooling", "mean", "RetrieverConfig.pooling = 'mean': must be one of average, sqrt, cls"),
        ("dtype", "float16", "RetrieverConfig.dtype = 'float16'"),
        ("num_heads", 5, "num_heads = 5: must divide RetrieverConfig.hidden_dim = 36"),
        ("num_layers", 0, "RetrieverConfig.num_layers = 0: expected a whole number from 1 to 512"),
        ("dropout_rate", 1.0, "RetrieverConfig.dropout_rate = 1.0"),
    ],
)
def test_bad_bindings_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        retriever_config(**{field: value})


def test_masks_types_and_looked_up_tokens(params: dict[str, Any]) -> None:
    model, tokens = BertEncoder(config()), jnp.array([[5, 9, 3, 44], [5, 9, 0, 0]])
    run = functools.partial(model.apply, {"params": params})
    plain = run(tokens)
    real = tokens != 0
    np.testing.assert_array_equal(run(tokens, mask=real), plain)
    square = jnp.broadcast_to(real[:, None], (2, 4, 4))
    np.testing.assert_array_equal(run(tokens, mask=square), plain)
    np.testing.assert_array_equal(run(tokens, types_bl=jnp.zeros_like(tokens)), plain)
    assert np.abs(run(tokens, types_bl=jnp.ones_like(tokens)) - plain).max() > 0.1
    looked_up = run(tokens, method="embed_tokens")
    np.testing.assert_array_equal(run(tokens, embedded_ble=looked_up), plain)

    past = run(tokens, mask=jnp.tril(square))  # a token reads itself and what comes before it
    short = run(tokens[:, :2], mask=jnp.tril(square)[:, :2, :2])
    np.testing.assert_allclose(past[:, :2], short, atol=1e-6)
    assert np.abs(past[0] - plain[0]).max() > 0.01


@pytest.mark.parametrize("scan", [False, True])
def test_states_of_every_layer(params: dict[str, Any], scan: bool) -> None:
    model, tokens = BertEncoder(config(scan_layers=scan)), jnp.array([[5, 9, 3, 44]])
    every = model.apply({"params": params}, tokens, method="all_states")
    last = model.apply({"params": params}, tokens)
    assert [state.shape for state in every] == [(1, 4, 36)] * 3
    np.testing.assert_array_equal(every[-1], last)
    one = BertEncoder(config(num_layers=1)).apply({"params": params}, tokens)
    np.testing.assert_allclose(every[1], one, atol=1e-6)
    embedded = BertEmbeddings(config()).apply({"params": params["embeddings"]}, tokens, True)
    np.testing.assert_allclose(every[0], embedded, atol=1e-6)
