"""A reader with a pair encoder and a pointer: blocks, kept states, the mixture, decoding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import (
    STANDARD_RULES,
    MeshConfig,
    activate,
    make_mesh,
    param_shardings,
)
from atlas_jax.reader import fid, inputs
from atlas_jax.reader.generate import GenerationConfig, generate
from atlas_jax.reader.pointer import Pointer
from atlas_jax.reader.t5 import T5, copyable
from tests.reader.small import PAIR, random_params

START, END = 2, 1
CONFIG = dataclasses.replace(PAIR, vocab_size=24, num_decoder_layers=2, start_id=START)
MODEL = T5(CONFIG)
PARAMS = random_params(MODEL)
_rng = np.random.default_rng(4)
QUERIES = _rng.integers(3, 24, (4, 3)).astype(np.int32)
QUERIES[1, 2] = 0
PASSAGES = _rng.integers(3, 24, (4, 3, 5)).astype(np.int32)
PASSAGES[0, 1, 3:] = 0
MASK = np.ones((4, 3), bool)
MASK[2, 2] = False
LENGTH = 12
TARGETS = np.array(
    [[*PASSAGES[0, 0, 1:4], 1], [8, 1, 0, 0], [*PASSAGES[2, 1, :2], 1, 0], [3, 4, 5, 1]], np.int32
)


def joined(passages: Any = PASSAGES, mask: Any = MASK) -> Any:
    return inputs.join_inputs(QUERIES, passages, mask, LENGTH, END, START)


TOKENS = joined()
REAL = TARGETS != 0


def close(ours: Any, expected: Any, **tolerance: Any) -> None:
    settings: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5, **tolerance}
    np.testing.assert_allclose(np.asarray(ours), np.asarray(expected), **settings)


def encoded(tokens: Any = TOKENS) -> Any:
    return fid.encode(MODEL, PARAMS, tokens)


def test_the_blocks_are_those_of_a_loop() -> None:
    expected = np.zeros((4, 3, LENGTH), np.int32)
    for b, k in zip(*np.nonzero(MASK), strict=True):
        query = [START, *(t for t in QUERIES[b] if t), END]
        passage = [START, *(t for t in PASSAGES[b, k] if t), END]
        expected[b, k, : len(query)] = query
        expected[b, k, 5 : 5 + len(passage)] = passage
    np.testing.assert_array_equal(TOKENS, expected)


def test_a_passage_that_is_too_long_keeps_its_end_token() -> None:
    cut = inputs.join_inputs(QUERIES, PASSAGES, MASK, 9, END, START)
    np.testing.assert_array_equal(cut[3, 0, 5:], [START, *PASSAGES[3, 0, :2], END])


def test_hidden_tokens_are_padding_and_move_nothing() -> None:
    rows = np.arange(12).reshape(4, 3)
    hidden = np.array([[0, 1, 2], [-1, 0, 4], [99, 0, 4], [10, 0, 3]])
    shown = inputs.hide(PASSAGES, rows, hidden)
    expected = PASSAGES.copy()
    expected[0, 0, 1], expected[3, 1, :3] = 0, 0
    np.testing.assert_array_equal(shown, expected)
    blocks = joined(shown)
    np.testing.assert_array_equal(blocks[3, 1], np.where(np.isin(np.arange(12), [6, 7, 8]), 0,
                                                         TOKENS[3, 1]))  # fmt: skip


def test_kept_states_give_what_running_the_lower_layers_gives() -> None:
    flat = PASSAGES.reshape(12, 5)
    kept = fid.encode_apart(MODEL, PARAMS, flat, LENGTH - 5)
    assert kept.shape == (12, 7, 8)
    ours = fid.encode(MODEL, PARAMS, TOKENS, apart_bkf=kept.reshape(4, 3, -1))
    real = np.asarray(TOKENS) != 0
    close(np.asarray(ours)[real], np.asarray(encoded())[real])


def test_a_passage_alone_does_not_depend_on_the_question_but_what_is_made_of_both_does() -> None:
    swapped = inputs.join_inputs(QUERIES[::-1], PASSAGES, MASK, LENGTH, END, START)
    at = (3, 1, slice(5, 12))  # a passage of row 3
    assert np.abs(np.asarray(encoded(swapped)[at] - encoded()[at])).max() > 1e-2


def test_only_the_upper_layers_and_the_decoder_have_gradients() -> None:
    def loss(params: Any) -> jax.Array:
        enc = fid.encode(MODEL, params, TOKENS)
        return fid.summed_loss(fid.fused_logprobs(MODEL, params, enc, TOKENS, TARGETS), TARGETS)[0]

    grads = jax.grad(loss)(PARAMS)
    sizes = {
        jax.tree_util.keystr(path): float(jnp.abs(leaf).max())
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    }
    frozen = ("['token_embedder']", "['encoder']['embeddings']", "['encoder']['layers_0']",
              "['encoder']['layers_1']")  # fmt: skip
    for name, size in sizes.items():
        still = name.startswith(frozen)
        silent = name.endswith("['key']['bias']")  # the same for all keys: softmax ignores it
        assert (size < 1e-5) == (still or silent), (name, size)


@pytest.mark.parametrize("passages", [1, 3])
def test_the_mixture_sums_to_one_and_copies(passages: int) -> None:
    tokens = TOKENS[:, :passages]
    enc = encoded(tokens)
    logits = fid.fused_logits(MODEL, PARAMS, enc, tokens, TARGETS)
    close(jnp.sum(jnp.exp(logits), axis=-1), np.ones((4, 4)))
    picked = np.take_along_axis(np.asarray(logits), TARGETS[..., None], axis=-1)[..., 0]
    ours = fid.fused_logprobs(MODEL, PARAMS, enc, tokens, TARGETS)
    close(np.asarray(ours)[REAL], picked[REAL])


def test_the_mixture_is_the_formula_of_plain_numpy() -> None:
    tokens, targets = TOKENS[:1, :1], TARGETS[:1, :1]
    enc = np.asarray(encoded(tokens))[0, 0]
    states, _ = MODEL.apply(
        {"params": PARAMS}, enc[None], tokens[0][None] > 0, np.zeros((1, 1, 1), np.int32),
        method="decode_states",
    )  # fmt: skip
    state = np.asarray(states, np.float64)[0, 0, 0]
    pointer = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS["decoder"]["pointer"])
    base = (enc @ pointer["key"]["kernel"]) @ (state @ pointer["query"]["kernel"]) / np.sqrt(8)
    text = slice(6, 11)  # the passage without its start and end token
    a = np.exp(base[text]) / np.exp(base[text]).sum()  # nothing to go on with yet
    gate = state @ pointer["gate"]["kernel"][:, 0] + pointer["gate"]["bias"][0]
    vocabulary = np.asarray(MODEL.apply({"params": PARAMS}, states, method="logits"))[0, 0, 0]
    target = int(targets[0, 0])
    v = np.exp(vocabulary[target]) / np.exp(vocabulary).sum()
    g = 1 / (1 + np.exp(-gate))
    copied = a[np.asarray(tokens)[0, 0, text] == target].sum()
    assert copied > 0
    ours = fid.fused_logprobs(MODEL, PARAMS, encoded(tokens), tokens, targets)
    close(ours[0, 0], np.log(g * v + (1 - g) * copied))


def test_what_stands_after_a_copied_token_moves_the_gate() -> None:
    """The log-odds rise by e(s), averaged over the places after those where the pointer stood."""
    tokens, targets = TOKENS[:1, :1], TARGETS[:1, :1].repeat(2, axis=1)
    enc = np.asarray(encoded(tokens))[0, 0]
    copied = np.asarray(copyable(tokens, CONFIG))[0, 0]
    read = (enc[None], tokens[0][None] > 0, np.asarray([[[0, int(targets[0, 0])]]], np.int32))
    states, _ = MODEL.apply({"params": PARAMS}, *read, method="decode_states")
    module = Pointer(CONFIG)
    variables = {"params": PARAMS["decoder"]["pointer"]}
    source = module.apply(variables, enc[None], copied[None], method="source")
    log_a, odds = module.apply(variables, states, read[2], source, np.ones((1, 1, len(enc)), bool))
    pointer = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS["decoder"]["pointer"])
    hit = copied == int(targets[0, 0])
    assert hit.any()
    stood = np.exp(np.asarray(log_a)[0, 0, 0]) * hit
    ends = enc @ pointer["ends"]["kernel"][:, 0] + pointer["ends"]["bias"][0]
    gate = np.asarray(states)[0, 0] @ pointer["gate"]["kernel"][:, 0] + pointer["gate"]["bias"][0]
    expected = [gate[0], gate[1] + (stood / stood.sum())[:-1] @ ends[1:]]
    close(odds[0, 0], np.asarray(expected))


def test_without_weights_what_stands_next_changes_nothing() -> None:
    plain = T5(dataclasses.replace(CONFIG, pointer_ends=False))
    params = jax.tree.map(lambda leaf: leaf, PARAMS)
    ends = params["decoder"]["pointer"]["ends"]
    params["decoder"]["pointer"]["ends"] = jax.tree.map(np.zeros_like, ends)
    ours = fid.fused_logprobs(MODEL, params, encoded(), TOKENS, TARGETS)
    del params["decoder"]["pointer"]["ends"]
    np.testing.assert_array_equal(
        ours, fid.fused_logprobs(plain, params, encoded(), TOKENS, TARGETS)
    )


def test_without_a_passage_all_is_of_the_vocabulary() -> None:
    nothing = inputs.join_inputs(QUERIES, 0 * PASSAGES[:, :1, :1], MASK[:, :1], LENGTH, END, START)
    assert (np.asarray(copyable(nothing, CONFIG)) == 0).all()
    enc = encoded(nothing)
    logits = fid.fused_logits(MODEL, PARAMS, enc, nothing, TARGETS)
    close(jnp.sum(jnp.exp(logits), axis=-1), np.ones((4, 4)))


def test_a_passage_alone_is_one_passage_fused_at_any_temperature() -> None:
    for temperature in (1.0, 0.5):
        ours = fid.passage_logprobs(MODEL, PARAMS, encoded(), TOKENS, TARGETS, temperature)
        for k in range(2):
            one = TOKENS[:, k : k + 1]
            logits = fid.fused_logits(MODEL, PARAMS, encoded(one), one, TARGETS) / temperature
            logp = np.asarray(jax.nn.log_softmax(logits))
            picked = np.take_along_axis(logp, TARGETS[..., None], axis=-1)[..., 0]
            close(np.asarray(ours[:, k])[REAL], picked[REAL])


def test_leaving_one_out_is_not_having_it() -> None:
    ours = fid.leave_one_out_logprobs(MODEL, PARAMS, encoded(), TOKENS, TARGETS)
    without = np.asarray(TOKENS).copy()
    without[:, 1] = 0
    expected = fid.fused_logprobs(MODEL, PARAMS, encoded(), without, TARGETS)
    close(np.asarray(ours[:, 1])[REAL], np.asarray(expected)[REAL])


def answers(settings: GenerationConfig, params: Any = PARAMS, tokens: Any = TOKENS) -> Any:
    enc = fid.encode(MODEL, params, tokens)
    b, k, length, d = enc.shape
    fused = (b, k * length)
    return generate(
        MODEL,
        params,
        enc.reshape(*fused, d),
        (tokens != 0).reshape(fused),
        settings,
        copyable_bs=copyable(tokens, CONFIG).reshape(fused),
    )[:2]


@pytest.mark.parametrize(
    "settings",
    [
        GenerationConfig(max_length=5, min_length=3),
        GenerationConfig(max_length=5, min_length=3, method="beam", num_beams=3),
    ],
    ids=["greedy", "beam"],
)
def test_decoding_step_by_step_scores_as_the_whole_target_does(settings: GenerationConfig) -> None:
    tokens_bt, scores_b = answers(settings)
    logp = np.asarray(fid.fused_logprobs(MODEL, PARAMS, encoded(), TOKENS, tokens_bt))
    real = np.asarray(tokens_bt) != 0
    total = np.where(real, logp, 0).sum(axis=1)
    if settings.method == "beam":
        total = total / real.sum(axis=1)
    close(scores_b, total)


def test_sharded_equals_one_device() -> None:
    def compute(params: Any, tokens: Any, targets: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            enc = fid.encode(MODEL, params, tokens)
            logp = fid.fused_logprobs(MODEL, params, enc, tokens, targets)
            return fid.summed_loss(logp, targets)[0]

        enc = fid.encode(MODEL, params, tokens)
        reading = (MODEL, params, enc, tokens, targets)
        beam = GenerationConfig(max_length=4, method="beam", num_beams=2)
        return (
            jax.value_and_grad(loss)(params),
            fid.passage_logprobs(*reading),
            fid.leave_one_out_logprobs(*reading),
            fid.cross_attention_mass(*reading),
            answers(beam, params, tokens),
        )

    expected = jax.jit(compute)(PARAMS, TOKENS, TARGETS)
    mesh = make_mesh(MeshConfig(data=4, model=2))
    boxed = jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS[:1, 0], TARGETS[:1])["params"]
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with activate(mesh, STANDARD_RULES):
        placed = jax.device_put(PARAMS, param_shardings(boxed, mesh, STANDARD_RULES))
        data = [jax.device_put(np.asarray(x), rows) for x in (TOKENS, TARGETS)]
        ours = jax.jit(compute)(placed, *data)
    jax.tree.map(lambda a, b: close(a, b, atol=1e-4), ours, expected)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"encoder": "t5", "pointer_ends": False}, "pointer"),
        ({"pointer": False}, "pointer_ends"),
        ({"apart_layers": 4}, "apart_layers"),
        ({"encoder_mlp_dim": 0}, "encoder_mlp_dim"),
        ({"scan_layers": True}, "scan_layers"),
        ({"head_dim": 5}, "emb_dim"),
        ({"start_id": 24}, "start_id"),
        ({"encoder": "rnn"}, "encoder"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"ReaderConfig.{named}"):
        dataclasses.replace(CONFIG, **changes)
