"""The wired start sees which place of a passage shares most tokens with the question."""

import copy
import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax.core import meta

from atlas_jax.core.errors import UserError
from atlas_jax.reader import fid
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.induction import code_directions, wire_induction
from atlas_jax.reader.matching import wire_matching
from atlas_jax.reader.t5 import T5

CONFIG = ReaderConfig(
    vocab_size=400,
    emb_dim=192,
    num_heads=4,
    head_dim=64,
    mlp_dim=64,
    num_encoder_layers=3,
    num_decoder_layers=2,
    logits_via_embedding=True,
    mlp_activations=("relu",),
    dropout_rate=0.0,
)
SENTINELS = [399, 398, 397]
ROWS, QUESTION, PASSAGE = 40, 6, 60


@pytest.fixture(scope="module")
def induction() -> Any:
    tokens = np.ones((1, 4), np.int32)
    made = jax.jit(T5(CONFIG).init)(jax.random.key(0), tokens, tokens)
    return wire_induction(meta.unbox(made)["params"], CONFIG)


def sources() -> tuple[np.ndarray, np.ndarray]:
    """Questions, a sentinel and passages [b, l], and where two words of a question end in them.

    All other tokens of a passage, but one that stands elsewhere, are not in its question.
    """
    rng = np.random.default_rng(0)
    rows, ends = [], []
    for _ in range(ROWS):
        words = rng.permutation(np.arange(3, 390))[: QUESTION + PASSAGE]
        question, passage = words[:QUESTION], words[QUESTION:]
        end = int(rng.integers(20, PASSAGE - 10))
        passage[end - 2 : end] = rng.choice(question, 2, replace=False)
        passage[(end + 30) % PASSAGE] = question[0]
        rows.append([*question, SENTINELS[0], *passage])
        ends.append(QUESTION + 1 + end)
    return np.array(rows, np.int32), np.array(ends)


def test_most_hits_are_seen_behind_the_words_of_the_question(induction: Any) -> None:
    tokens_bl, ends_b = sources()
    hits = code_directions(CONFIG, 0)[2 * CONFIG.head_dim + 4]
    encode = jax.jit(lambda params: fid.encode(T5(CONFIG), params, tokens_bl[:, None])[:, 0])

    def found(params: Any) -> float:
        seen_bl = np.asarray(encode(params)) @ hits
        best_b = np.argmax(seen_bl[:, QUESTION + 8 :], axis=1) + QUESTION + 8
        return float(np.mean((best_b >= ends_b - 1) & (best_b <= ends_b + 7)))

    # 9 places of 53, by chance 0.17; two words of six, in one of many draws of the directions
    assert found(wire_matching(induction, CONFIG, SENTINELS)) > 0.5
    assert found(induction) < 0.3
    assert found(wire_matching(induction, CONFIG, [396])) < 0.3  # question and passage are one


def test_the_parameters_given_stay_and_the_new_ones_have_their_form(induction: Any) -> None:
    before = copy.deepcopy(induction)
    wired = wire_matching(induction, CONFIG, SENTINELS)
    jax.tree.map(np.testing.assert_array_equal, induction, before)
    forms = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (induction, wired)
    ]
    assert forms[0] == forms[1]
    embedding = wired["token_embedder"]["embedding"]
    constant, sentinel = code_directions(CONFIG, 0)[2 * CONFIG.head_dim :][:2]
    np.testing.assert_allclose(embedding @ constant, 2, rtol=1e-4)
    marked = np.isin(np.arange(CONFIG.vocab_size), SENTINELS)
    np.testing.assert_allclose(embedding @ sentinel, 5 * marked, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_encoder_layers": 2}, "ReaderConfig.num_encoder_layers = 2: .* needs 3 or more"),
        ({"emb_dim": 144}, "ReaderConfig.head_dim = 64: .* needs 61 or less where emb_dim is 144"),
    ],
)
def test_a_reader_that_cannot_be_wired_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        wire_matching({}, dataclasses.replace(CONFIG, **changes), SENTINELS)
