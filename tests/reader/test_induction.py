"""The wired start copies what follows the present token in the source; a random one does not."""

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from atlas_jax.core.errors import UserError
from atlas_jax.reader import fid
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.induction import wire_induction
from atlas_jax.reader.t5 import T5

CONFIG = ReaderConfig(
    vocab_size=64,
    emb_dim=128,
    num_heads=4,
    head_dim=64,
    mlp_dim=64,
    num_encoder_layers=1,
    num_decoder_layers=2,
    logits_via_embedding=True,
    mlp_activations=("relu",),
    dropout_rate=0.0,
)
ROWS, LENGTH = 48, 12


@pytest.fixture(scope="module")
def fresh() -> Any:
    """Parameters as a new run draws them."""
    tokens = np.ones((1, 4), np.int32)
    made = jax.jit(T5(CONFIG).init)(jax.random.key(0), tokens, tokens)
    return jax.tree.map(np.asarray, meta.unbox(made)["params"])


@jax.jit
def next_logits(params: Any, source_bl: jax.Array, targets_bt: jax.Array) -> jax.Array:
    """Logits [b, v] of the target's last token, those before it given."""
    tokens_bkl = source_bl[:, None]
    enc = fid.encode(T5(CONFIG), params, tokens_bkl)
    return fid.fused_logits(T5(CONFIG), params, enc, tokens_bkl, targets_bt)[:, -1]


def ranks(params: Any, given: int, repeated: bool = False) -> np.ndarray:
    """How many tokens come before the one that follows in the source what was just written.

    Args:
      params: of the reader.
      given: tokens that were just written.
      repeated: the last of these stands at another place of the source, too.
    """
    rng, row = np.random.default_rng(0), np.arange(ROWS)
    words = np.arange(3, CONFIG.vocab_size)
    source = np.stack([rng.permutation(words)[:LENGTH] for _ in range(ROWS)]).astype(np.int32)
    at = rng.integers(given, LENGTH // 2, ROWS)
    if repeated:
        source[row, at + LENGTH // 2 - 1] = source[row, at - 1]
    targets = source[row[:, None], at[:, None] + np.arange(-given, 1)]
    logits_bv = np.asarray(next_logits(params, jnp.asarray(source), jnp.asarray(targets)))
    return (logits_bv > logits_bv[row, targets[:, -1]][:, None]).sum(axis=1)


@pytest.mark.parametrize("repeated", [False, True])
def test_what_follows_the_last_two_tokens_comes_first(fresh: Any, repeated: bool) -> None:
    wired = wire_induction(fresh, CONFIG)
    random, copied = ranks(fresh, 2, repeated), ranks(wired, 2, repeated)
    assert (random == 0).mean() < 0.1 and np.median(random) > 15
    assert (copied == 0).mean() > 0.5 and np.median(copied) <= 1


def test_the_parameters_given_stay_and_the_new_ones_have_their_form(fresh: Any) -> None:
    before = copy.deepcopy(fresh)
    wired = wire_induction(fresh, CONFIG, seed=1)
    jax.tree.map(np.testing.assert_array_equal, fresh, before)
    forms = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (fresh, wired)]
    assert forms[0] == forms[1]
    again = wire_induction(fresh, CONFIG, seed=1)
    jax.tree.map(np.testing.assert_array_equal, wired, again)
    embedding = [params["token_embedder"]["embedding"] for params in (fresh, wired)]
    np.testing.assert_array_equal(*embedding)
    heads = [
        wire_induction(fresh, CONFIG, seed=seed)["encoder"]["layers_0"]["attention"]["out"][
            "kernel"
        ]
        for seed in (1, 2)
    ]
    drawn, kept = np.r_[0:64, 192:256], slice(64, 192)  # rows of heads 0 and 3, and of 1 and 2
    assert not np.array_equal(*(kernel[drawn] for kernel in heads))
    np.testing.assert_array_equal(*(kernel[kept] for kernel in heads))


def test_heads_look_to_the_left_with_few_buckets_too() -> None:
    """Buckets from half of the table on are of the tokens to the right."""
    config = dataclasses.replace(
        CONFIG, relpos_buckets=8, emb_dim=8, head_dim=4, mlp_dim=8, vocab_size=8
    )
    tokens = np.ones((1, 2), np.int32)
    drawn = jax.eval_shape(T5(config).init, jax.random.key(0), tokens, tokens)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), meta.unbox(drawn)["params"])
    table = wire_induction(ones, config)["encoder"]["relpos_bias"]["rel_embedding"]
    assert table[0, 1] > 0 and table[2, 1] > 0 and table[3, 2] > 0
    assert not table[:, 4:].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scan_layers": True}, "ReaderConfig.scan_layers = True: .* needs False"),
        ({"num_heads": 3}, "ReaderConfig.num_heads = 3: .* needs 4 or more"),
        ({"head_dim": 65}, "ReaderConfig.head_dim = 65: .* needs 64 or less"),
        (
            {"logits_via_embedding": False},
            "ReaderConfig.logits_via_embedding = False: .* needs True",
        ),
    ],
)
def test_a_reader_that_cannot_be_wired_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        wire_induction({}, dataclasses.replace(CONFIG, **changes))
