"""Losses of pretraining against NumPy, replaced tokens, and ELECTRA's generator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.encoders.model import EncoderModelConfig
from atlas_jax.encoders.objectives import (
    generator_config,
    replaced_loss,
    sampled,
    sentence_loss,
    token_loss,
    unified_masks,
    with_tokens,
)


def test_losses_equal_those_in_numpy() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
    labels = np.array([[1, 4, 0], [2, 2, 0]])
    weights = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    own = -np.log(np.take_along_axis(shares, labels[..., None], -1)[..., 0])
    loss, accuracy = token_loss(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weights))
    np.testing.assert_allclose(loss, own[weights > 0].mean(), rtol=1e-6)
    right = (logits.argmax(-1) == labels)[weights > 0]
    np.testing.assert_allclose(accuracy, right.mean())
    pair, _ = sentence_loss(jnp.asarray(logits[:, 0, :2]), jnp.asarray(labels[:, 2]))
    two = np.exp(logits[:, 0, :2])
    np.testing.assert_allclose(pair, -np.log(two[:, 0] / two.sum(-1)).mean(), rtol=1e-6)
    replaced, real = labels == 2, np.array([[True, True, False], [True, True, True]])
    found, share = replaced_loss(jnp.asarray(logits[..., 0]), replaced, real)
    p = 1 / (1 + np.exp(-logits[..., 0]))
    wanted = -np.where(replaced, np.log(p), np.log(1 - p))[real].mean()
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(share, ((p > 0.5) == replaced)[real].mean())


def test_only_chosen_places_get_other_tokens() -> None:
    tokens = jnp.array([[2, 5, 6, 7], [2, 8, 9, 0]])
    positions, weights = jnp.array([[1, 3], [2, 0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]])
    new = with_tokens(tokens, positions, weights, jnp.array([[30, 31], [32, 33]]))
    assert new.tolist() == [[2, 30, 6, 31], [2, 8, 32, 0]]


def test_unified_masks_are_of_four_kinds_and_hide_padding() -> None:
    real = np.ones((600, 7), bool)
    real[::3, 5:] = False
    masks = np.asarray(jax.jit(unified_masks)(jax.random.key(0), jnp.asarray(real)))
    left = np.tri(7, dtype=bool)
    counts = dict.fromkeys(("all", "left", "right", "target"), 0)
    splits = set()
    for mask, row in zip(masks, real, strict=True):
        count = row.sum()
        assert not mask[:, count:].any()
        own = mask[:count, :count]
        shapes = {"all": np.ones_like(own), "left": left, "right": left.T}
        found = [name for name, shape in shapes.items() if (own == shape[:count, :count]).all()]
        if found:
            counts[found[0]] += 1
            continue
        counts["target"] += 1
        source = int(own[0].sum())  # the first token reads the source alone
        splits.add(source)
        wanted = left[:count, :count].copy()
        wanted[:, :source] = True
        np.testing.assert_array_equal(own, wanted)
    # A source of one token is "left", one of all but the last token is still a target's.
    assert set(range(2, 7)) == splits
    assert counts["all"] / 600 == pytest.approx(1 / 3, abs=0.06)
    assert counts["right"] / 600 == pytest.approx(1 / 6, abs=0.05)
    assert counts["left"] + counts["target"] == 600 - counts["all"] - counts["right"]


def test_samples_follow_the_softmax_and_take_no_gradient() -> None:
    logits = jnp.log(jnp.array([0.1, 0.2, 0.7]))
    many = sampled(jax.random.key(0), jnp.broadcast_to(logits, (100, 300, 3)))
    np.testing.assert_allclose(np.bincount(np.asarray(many).ravel()) / 30000, [0.1, 0.2, 0.7],
                               atol=0.01)  # fmt: skip


@pytest.mark.parametrize(
    ("encoder", "options", "kind", "width"),
    [("electra", {"factor_dim": 12}, "electra", 12), ("bert", {}, "electra", 16),
     ("albert", {"factor_dim": 6, "num_groups": 2}, "albert", 6)],
)  # fmt: skip
def test_a_generator_is_narrower_and_has_tables_of_the_same_width(
    encoder: str, options: dict[str, int], kind: str, width: int
) -> None:
    config = EncoderModelConfig(encoder=encoder, encoder_options=options, vocab_size=20,
                                hidden_dim=16, num_layers=2, num_heads=4, mlp_dim=32)  # fmt: skip
    small = generator_config(config, 0.25)
    assert (small.hidden_dim, small.num_heads, small.mlp_dim, small.num_layers) == (4, 1, 8, 2)
    assert (small.encoder, small.heads, small.tower.table_dim) == (kind, ("mlm",), width)  # type: ignore[attr-defined]


def test_a_roberta_has_no_generator() -> None:
    config = EncoderModelConfig(encoder="roberta", vocab_size=20)
    with pytest.raises(UserError, match="'roberta' has no narrower twin"):
        generator_config(config, 0.25)
