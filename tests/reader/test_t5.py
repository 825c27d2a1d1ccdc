"""T5 itself: its two forms, rematerialisation, dropout, masks, positions and precision."""

import functools
import math
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core import partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.reader import attention
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.scanned import stack_layers, unstack_layers
from atlas_jax.reader.t5 import T5
from tests.reader.small import config, passages, random_params

TOKENS, TARGETS = passages()
TOKENS = TOKENS[:, 0]
INPUTS = np.pad(TARGETS, ((0, 0), (1, 0)))[:, :-1]


@functools.cache
def values_and_gradients(dropout: bool = False, **changes: Any) -> tuple[Any, Any]:
    """Logits and gradients of a fixed loss, the latter in the unrolled form."""
    model = T5(config(**changes))
    params = random_params(T5(config()))
    scanned = model.config.scan_layers

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        rngs = {"dropout": jax.random.key(5)} if dropout else None
        params = stack_layers(params) if scanned else params
        logits = model.apply({"params": params}, TOKENS, INPUTS, not dropout, rngs=rngs)
        return jnp.mean(jnp.sin(logits)), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return logits, gradients


def assert_close(ours: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), ours, theirs
    )


def test_scanned_layers_equal_unrolled_ones() -> None:
    assert_close(values_and_gradients(scan_layers=True), values_and_gradients())


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("remat_policy", ["minimal", "full"])
def test_rematerialisation_changes_nothing(remat_policy: str, scan_layers: bool) -> None:
    changed = values_and_gradients(remat_policy=remat_policy, scan_layers=scan_layers)
    assert_close(changed, values_and_gradients())


def test_rematerialisation_keeps_the_dropout_masks() -> None:
    plain = values_and_gradients(dropout=True)
    assert_close(values_and_gradients(dropout=True, remat_policy="full"), plain)


def test_dropout_depends_on_the_key_alone() -> None:
    model = T5(config())
    params = random_params(model)

    @jax.jit
    def logits(key: jax.Array) -> jax.Array:
        return model.apply({"params": params}, TOKENS, INPUTS, False, rngs={"dropout": key})

    first = logits(jax.random.key(1))
    np.testing.assert_array_equal(first, logits(jax.random.key(1)))
    assert np.abs(first - logits(jax.random.key(2))).max() > 0.1
    silent = jax.jit(model.apply)(
        {"params": params}, TOKENS, INPUTS, rngs={"dropout": jax.random.key(1)}
    )
    assert_close(silent, values_and_gradients()[0])


def test_stack_and_unstack_are_inverse_and_match_the_scanned_tree() -> None:
    params = random_params(T5(config()))
    stacked = stack_layers(params)
    back = unstack_layers(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    scanned = random_params(T5(config(scan_layers=True)))
    assert jax.tree.map(np.shape, stacked) == jax.tree.map(np.shape, scanned)


def test_more_than_ten_layers_keep_their_order() -> None:
    layers = {f"layers_{i}": {"scale": np.array([i])} for i in range(12)}
    stacked = stack_layers({"encoder": layers, "decoder": layers})
    np.testing.assert_array_equal(stacked["encoder"]["layers"]["scale"][:, 0], np.arange(12))


def test_scanned_parameters_carry_the_layers_axis() -> None:
    tokens = np.ones((1, 2), np.int32)
    model = T5(config(scan_layers=True))
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)["params"]
    names = {k: v.names for k, v in flax.traverse_util.flatten_dict(boxed, sep="/").items()}
    assert names["encoder/layers/attention/query/kernel"] == ("layers", "embed", "joined_kv")
    assert names["decoder/layers/mlp/wo/kernel"] == ("layers", "mlp", "embed")
    assert names["decoder/relpos_bias/rel_embedding"] == ("heads", "relpos_buckets")


def test_initial_activations_are_of_order_one() -> None:
    model = T5(config(emb_dim=32, num_heads=4, head_dim=8, mlp_dim=64))
    params = jax.jit(model.init)(jax.random.key(0), TOKENS, INPUTS)
    logits = jax.jit(model.apply)(params, TOKENS, INPUTS)
    assert 0.3 < float(jnp.std(logits)) < 3


def test_padding_changes_nothing() -> None:
    model = T5(config())
    params = {"params": random_params(model)}
    wider = np.pad(TOKENS, ((0, 0), (0, 3)))
    longer = np.pad(INPUTS, ((0, 0), (0, 2)), constant_values=7)  # later targets, not seen
    logits = jax.jit(model.apply)(params, wider, longer)
    assert_close(logits[:, : INPUTS.shape[1]], values_and_gradients()[0])


def test_bfloat16_keeps_float32_logits_near_the_float32_ones() -> None:
    exact = values_and_gradients()[0]
    for float32_attention_logits in (True, False):
        rounded = values_and_gradients(
            dtype="bfloat16", float32_attention_logits=float32_attention_logits
        )[0]
        assert rounded.dtype == jnp.float32
        assert np.corrcoef(np.ravel(rounded), np.ravel(exact))[0, 1] > 0.99


@pytest.mark.parametrize("scan_layers", [False, True])
def test_cached_steps_equal_the_whole_pass(scan_layers: bool) -> None:
    tokens, inputs = jnp.asarray(TOKENS), jnp.asarray(INPUTS)
    model = T5(config(scan_layers=scan_layers))
    params = random_params(T5(config()))

    @jax.jit
    def stepwise(params: Any) -> jax.Array:
        apply = functools.partial(model.apply, {"params": params})
        encoded = apply(tokens, method="encode")
        length = inputs.shape[1]
        state = apply(encoded, tokens > 0, 1, length, method="start_decoding")
        _, logits = jax.lax.scan(
            lambda state, now: apply(now, state, method="step")[::-1], state, inputs.T
        )
        return logits.swapaxes(0, 1)

    logits = stepwise(stack_layers(params) if scan_layers else params)
    assert_close(logits, values_and_gradients()[0])


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_follow_the_formula(bidirectional: bool) -> None:
    distances = np.arange(-300, 301)
    buckets = attention.relative_buckets(distances, bidirectional, 32, 128)
    half = 16 if bidirectional else 32
    exact = half // 2
    for distance, bucket in zip(distances.tolist(), buckets.tolist(), strict=True):
        offset = half if bidirectional and distance > 0 else 0
        away = abs(distance) if bidirectional else max(-distance, 0)
        if away >= exact:  # in exact arithmetic, with a hair for the logarithm of a power of two
            steps = math.log2(away / exact) / math.log2(128 / exact) * (half - exact)
            away = min(exact + math.floor(steps + 1e-9), half - 1)
        assert bucket == offset + away, distance


def test_position_bias_is_the_table_at_the_bucket_of_the_distance() -> None:
    bias = attention.RelativePositionBias(config(), bidirectional=True)
    params = bias.init(jax.random.key(0), 3, 5)
    table = np.asarray(params["params"]["rel_embedding"].value)
    values = np.asarray(bias.apply(params, 3, 5))
    for query in range(3):
        for key in range(5):
            bucket = attention.relative_buckets(np.array([key - query]), True, 32, 128)
            np.testing.assert_allclose(values[0, :, query, key], table[:, bucket[0]], rtol=1e-6)


def test_attention_mass_needs_one_variant() -> None:
    model = T5(config())
    states, mask = jnp.zeros((1, 5, 12)), jnp.ones((1, 2, 5), bool)
    with pytest.raises(ValueError, match="one variant"):
        model.apply(
            {"params": random_params(model)},
            states,
            mask,
            jnp.zeros((1, 2, 3), int),
            jnp.ones((1, 3)),
            method="decode_states",
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emb_dim": 0}, r"ReaderConfig.emb_dim = 0: expected a whole number from 1 to"),
        (
            {"dropout_rate": 1.0},
            "dropout_rate = 1.0: expected a finite number",
        ),
        ({"mlp_activations": ("gelu",)}, r"mlp_activations = \('gelu',\): must be \('relu',\) or"),
        ({"dtype": "float16"}, r"dtype = 'float16': must be 'float32' or 'bfloat16'"),
        ({"remat_policy": "all"}, r"remat_policy = 'all': expected 'none' or 'minimal' or 'full'"),
        ({"relpos_buckets": 30}, r"relpos_buckets = 30: must be a multiple of 4"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_config_takes_the_lists_of_gin() -> None:
    assert hash(config(mlp_activations=["relu"])) == hash(config(mlp_activations=("relu",)))
    assert isinstance(config(), ReaderConfig)


def test_host_arrays_are_stacked_on_the_host() -> None:
    """Under a mesh, `jnp.stack` would lay every stacked layer whole on every device."""
    layer = {"layers_0": {"kernel": np.ones((2, 3))}, "layers_1": {"kernel": np.zeros((2, 3))}}
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=1, fsdp=8))
    with partitioning.activate(mesh):
        stacked = stack_layers({"encoder": layer, "decoder": layer})
    kernel = stacked["encoder"]["layers"]["kernel"]
    assert isinstance(kernel, np.ndarray) and kernel.shape == (2, 2, 3)
    assert not isinstance(stacked["decoder"]["layers"]["kernel"], jax.Array)
