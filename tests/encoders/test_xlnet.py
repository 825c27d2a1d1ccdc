"""XLNet: parity with Hugging Face in states, loss and gradients; orders; what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.core import meta

from atlas_jax.core.deltas import DeltaConfig, new_delta
from atlas_jax.core.errors import UserError
from atlas_jax.core.trees import joined
from atlas_jax.encoders.model import EncoderModel, EncoderModelConfig
from atlas_jax.encoders.objectives import permutation_masks, token_loss, with_objectives
from atlas_jax.encoders.xlnet import at_distances, waves
from tests.goldens import make_xlnet_goldens as goldens

FIELDS: dict[str, Any] = {**goldens.CONFIG, "encoder": "xlnet", "heads": ("plm",)}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(goldens.FILE) as file:
        return dict(file)


def below(golden: dict[str, np.ndarray], prefix: str) -> Any:
    """The arrays whose names begin with a prefix, as a tree."""
    return traverse_util.unflatten_dict(
        {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}, sep="/"
    )


def test_states_are_those_of_hugging_face(golden: dict[str, np.ndarray]) -> None:
    model, batch = EncoderModel(EncoderModelConfig(**FIELDS)), goldens.batch()
    params = below(golden, "param/")

    def every(params: Any) -> Any:
        return model.apply(
            {"params": params}, batch["tokens"], types_bl=batch["types"],
            method=lambda model, tokens, **inputs: model.encoder.all_states(tokens, **inputs),
        )  # fmt: skip

    states = jax.jit(every)(params)
    real = batch["tokens"] != 0
    assert len(states) == 3
    for i, found in enumerate(states):
        np.testing.assert_allclose(found[real], golden[f"states/{i}"][real], rtol=1e-5, atol=1e-5)


def test_the_objective_and_its_gradient_are_those_of_hugging_face(
    golden: dict[str, np.ndarray],
) -> None:
    model: Any = EncoderModel(EncoderModelConfig(**FIELDS))
    batch = goldens.batch()

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        states = model.apply(
            {"params": params}, batch["tokens"], method="predicted",
            positions_bp=batch["positions"], content_bll=batch["content"],
            query_bpl=np.take_along_axis(batch["query"], batch["positions"][..., None], axis=1),
            types_bl=batch["types"],
        )  # fmt: skip
        logits = model.apply({"params": params}, states, method="permuted_logits")
        labels = np.take_along_axis(batch["tokens"], batch["positions"], axis=1)
        return token_loss(logits, labels, np.ones(labels.shape, np.float32))[0], logits

    params = below(golden, "param/")
    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-5)
    wanted = traverse_util.flatten_dict(below(golden, "gradient/"), sep="/")
    found = traverse_util.flatten_dict(grads, sep="/")
    assert set(found) == set(wanted)
    for name, expected in wanted.items():
        scale = np.abs(expected).max()
        assert scale > 0, name
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-4 * scale, err_msg=name)


def test_scores_of_distances_go_to_the_keys_at_these_distances() -> None:
    """Entry t of 2 l is the key t - l places behind the reader: key j of reader i is i - j."""
    length, positions = 5, jnp.array([[3, 0]])
    distances = np.arange(length, -length, -1.0, dtype=np.float32)
    readers = length + positions.shape[1]
    found = at_distances(jnp.broadcast_to(distances, (1, 2, readers, 10)), length, positions)
    wanted = np.array([0, 1, 2, 3, 4, 3, 0])[:, None] - np.arange(length)
    np.testing.assert_array_equal(found[0, 1], wanted)
    table = waves(length, 6)
    np.testing.assert_allclose(table[2], [*np.sin(3 / 1e4 ** np.array([0, 1 / 3, 2 / 3])),
                                          *np.cos(3 / 1e4 ** np.array([0, 1 / 3, 2 / 3]))],
                               rtol=1e-5)  # fmt: skip


def test_an_order_lets_targets_read_only_those_before_them() -> None:
    real = jnp.ones((400, 6), bool).at[:, 5].set(False)
    positions = jnp.broadcast_to(jnp.array([1, 3, 4, 0]), (400, 4))
    weights = jnp.broadcast_to(jnp.array([1.0, 1.0, 1.0, 0.0]), (400, 4))
    content, query = (
        np.asarray(x)
        for x in jax.jit(permutation_masks)(jax.random.key(0), real, positions, weights)
    )
    targets = [1, 3, 4]
    others = [0, 2]
    diagonal = np.eye(6, dtype=bool)
    np.testing.assert_array_equal(content[:, [1, 3, 4]] & ~diagonal[targets], query[:, :3])
    assert content[:, diagonal].all()
    assert not (content & ~diagonal)[:, :, 5].any()  # padding
    assert content[:, :5][:, :, others].all()  # what is no target is read by all
    assert not content[:, others][:, :, targets].any()  # and reads no target
    among = query[:, :3][:, :, targets]
    assert (among ^ among.transpose(0, 2, 1) == ~np.eye(3, dtype=bool)).all()  # one of each two
    ranks = among.sum(2)
    assert (np.sort(ranks, axis=1) == [0, 1, 2]).all()
    np.testing.assert_allclose((ranks == 0).mean(0), 1 / 3, atol=0.08)  # any of them is first


def test_a_target_is_not_told_by_its_own_token() -> None:
    """Nothing of a target, nor of those behind it in the order, reaches its prediction."""
    model: Any = EncoderModel(EncoderModelConfig(**FIELDS))
    drawn = jax.jit(model.init)(jax.random.key(1), jnp.ones((1, 4), jnp.int32))
    params = meta.unbox(drawn["params"])
    params = jax.tree.map(lambda x: x * 8, params)
    tokens = jnp.array([[2, 9, 8, 7, 6, 3]])
    positions, weights = jnp.array([[1, 3, 4]]), jnp.ones((1, 3))
    content, query = permutation_masks(jax.random.key(0), tokens > 0, positions, weights)

    @jax.jit
    def states(tokens: jax.Array) -> jax.Array:
        found: jax.Array = model.apply(
            {"params": params}, tokens, method="predicted", positions_bp=positions,
            content_bll=content, query_bpl=query,
        )  # fmt: skip
        return found[0]

    before = states(tokens)
    for number, position in enumerate((1, 3, 4)):
        other = np.asarray(states(tokens.at[0, position].set(30)))
        moved = np.abs(other - np.asarray(before)).max(axis=1) > 1e-5
        np.testing.assert_array_equal(moved, np.asarray(query)[0, :, position])
        assert not moved[number]


def test_a_prefix_of_an_xlnet_is_read_by_both_streams() -> None:
    model: Any = EncoderModel(EncoderModelConfig(**FIELDS))
    boxed = jax.jit(model.init)(jax.random.key(1), jnp.ones((1, 4), jnp.int32))["params"]
    config = DeltaConfig("prefix", length=3)
    params = joined(meta.unbox(boxed), meta.unbox(new_delta(boxed, config, jax.random.key(2))))
    tokens, positions = jnp.array([[2, 9, 8, 3]]), jnp.array([[1]])
    masks = permutation_masks(jax.random.key(0), tokens > 0, positions, jnp.ones((1, 1)))

    def run(params: Any) -> jax.Array:
        inputs = dict(zip(("content_bll", "query_bpl"), masks, strict=True))
        found: jax.Array = model.apply(
            {"params": params}, tokens, method="predicted", positions_bp=positions, **inputs
        )
        return found.sum()

    gradients = jax.jit(jax.grad(run))(params)["encoder"]["layers_1"]["attention"]["prefix"]
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"scan_layers": True}, "XlnetConfig.scan_layers = True: must be False"),
     ({"hidden_dim": 15}, "XlnetConfig.hidden_dim = 15: must be even")],
)  # fmt: skip
def test_what_an_xlnet_has_not_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EncoderModelConfig(**{**FIELDS, **fields})


def test_another_encoder_has_no_second_stream() -> None:
    with pytest.raises(UserError, match="encoder = 'bert': expected 'xlnet' with the objective"):
        with_objectives(EncoderModelConfig(vocab_size=20), ("xlnet",))
