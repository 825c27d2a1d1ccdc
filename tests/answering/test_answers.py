"""Choices and evidence against the plain way: one target, one set of passages at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.answering.answers import Answers, Reading, make_answer
from atlas_jax.core import partitioning
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.core.types import Batch, Choices, Passages
from atlas_jax.reader import fid, inputs
from atlas_jax.reader.generate import GenerationConfig
from tests.reader.small import random_params
from tests.training.models import READER_VOCAB, tiny_models

READER = tiny_models().reader
PARAMS = random_params(READER, seed=3)
LENGTH, K, ROWS = 16, 3, 2
RNG = np.random.default_rng(5)
QUERY = RNG.integers(3, READER_VOCAB, (ROWS, 4)).astype(np.int32)
TEXT = RNG.integers(3, READER_VOCAB, (ROWS, K, 6)).astype(np.int32)
CHOICES = np.array(
    [[[9, 5, 1, 0], [9, 6, 7, 1], [9, 8, 1, 0]], [[4, 1, 0, 0], [5, 3, 1, 0], [0, 0, 0, 0]]],
    np.int32,
)
PROMPT = np.array([[11, 12], [13, 0]], np.int32)


def batch(weights: np.ndarray | None = None, prompt: np.ndarray | None = None) -> Batch:
    return Batch(
        query_tokens_bq=QUERY,
        retriever_tokens_br=QUERY,
        target_tokens_bt=CHOICES[:, 0],
        excluded_rows_bx=np.full((ROWS, 1), -1, np.int32),
        weight_b=np.ones(ROWS, np.float32),
        prompt_tokens_bp=prompt,
        choices=None if weights is None else Choices(CHOICES, weights),
    )


def passages(keep: Any = slice(None)) -> Passages:
    text = TEXT[:, keep]
    shape = text.shape[:2]
    return Passages(
        rows_bk=np.zeros(shape, np.int32),
        scores_bk=np.zeros(shape, np.float32),
        reader_tokens_bkl=text,
        retriever_tokens_bkm=text,
        mask_bk=np.ones(shape, bool),
    )


def answer(made: Batch, reading: Reading, **generation: Any) -> Answers:
    mesh = partitioning.make_mesh(MeshConfig(), jax.devices()[:1])
    with partitioning.activate(mesh):
        function = make_answer(READER, GenerationConfig(**generation), reading, mesh)
        return jax.device_get(function({"reader": PARAMS}, made, passages()))


@jax.jit
def log_probs(text: Any, decoder: Any) -> jax.Array:
    """Of every decoder token, read from these passages, [b, t]."""
    mask = jnp.ones(text.shape[:2], bool)
    tokens = inputs.join_inputs(QUERY, text, mask, LENGTH, 1)
    enc = fid.encode(READER, PARAMS, tokens)
    logits = fid.fused_logits(READER, PARAMS, enc, tokens, decoder)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), decoder[..., None], axis=-1)
    return picked[..., 0]


def plain(tokens: np.ndarray, prompt: np.ndarray | None, text: np.ndarray = TEXT) -> np.ndarray:
    """Log-probabilities of the tokens behind each row's prompt, [b, t]."""
    fronts = [[] if prompt is None else [int(x) for x in row if x] for row in prompt_rows(prompt)]
    width = tokens.shape[1] + 2
    decoder = np.zeros((ROWS, width), np.int32)
    for row, front in enumerate(fronts):
        decoder[row, : len(front) + tokens.shape[1]] = [*front, *tokens[row]]
    found = np.asarray(log_probs(text, decoder))
    at = [range(len(front), len(front) + tokens.shape[1]) for front in fronts]
    return np.stack([found[row, list(places)] for row, places in enumerate(at)])


def prompt_rows(prompt: np.ndarray | None) -> Any:
    return [()] * ROWS if prompt is None else prompt


@pytest.mark.parametrize("prompt", [None, PROMPT], ids=["plain", "prompt"])
def test_a_choice_scores_its_weighted_log_probability(prompt: np.ndarray | None) -> None:
    real = CHOICES > 0
    weights = (real / np.maximum(real.sum(-1, keepdims=True), 1)).astype(np.float32)
    found = answer(batch(weights, prompt), Reading(K, LENGTH, chooses=True))
    scores = np.stack(
        [(plain(CHOICES[:, c], prompt) * weights[:, c]).sum(-1) for c in range(3)], axis=1
    )
    scores[1, 2] = -np.inf  # no choice
    expected = np.asarray(jax.nn.log_softmax(scores, axis=-1))
    np.testing.assert_allclose(found.choice_log_probs_bc[0], expected[0], atol=1e-4)
    np.testing.assert_allclose(found.choice_log_probs_bc[1, :2], expected[1, :2], atol=1e-4)
    assert found.choice_log_probs_bc[1, 2] < -1e6
    best = expected.argmax(-1)
    np.testing.assert_array_equal(found.tokens_bt, CHOICES[range(ROWS), best])
    np.testing.assert_allclose(found.scores_b, expected.max(-1), atol=1e-4)


@pytest.mark.parametrize("prompt", [None, PROMPT], ids=["plain", "prompt"])
def test_targets_are_scored_behind_the_prompt_that_is_taught(prompt: np.ndarray | None) -> None:
    reading = Reading(K, LENGTH, scores_targets=True)
    targets = CHOICES[:, 0]
    found = answer(batch(prompt=prompt), reading, max_length=4)
    expected = np.where(targets > 0, plain(targets, prompt), 0).sum(-1)
    np.testing.assert_allclose(found.target_log_probs_b, expected, atol=1e-4)
    assert answer(batch(prompt=prompt), Reading(K, LENGTH)).target_log_probs_b is None
    if prompt is not None:  # as it is tokenised with the target; the answers begin as before
        other = np.array([[14, 0], [15, 16]], np.int32)
        joined = batch(prompt=prompt).replace(joined_prompt_bp=other)
        again = answer(joined, reading, max_length=4)
        expected = np.where(targets > 0, plain(targets, other), 0).sum(-1)
        np.testing.assert_allclose(again.target_log_probs_b, expected, atol=1e-4)
        np.testing.assert_array_equal(again.tokens_bt, found.tokens_bt)


@pytest.mark.parametrize("prompt", [None, PROMPT], ids=["plain", "prompt"])
def test_evidence_is_what_single_passes_give(prompt: np.ndarray | None) -> None:
    reading = Reading(K, LENGTH, explains=True)
    found = answer(batch(prompt=prompt), reading, max_length=4)
    tokens = found.tokens_bt
    assert found.evidence is not None
    together = np.where(tokens > 0, plain(tokens, prompt), 0).sum(-1)
    np.testing.assert_allclose(found.scores_b, together, atol=1e-4)
    for k in range(K):
        alone = np.where(tokens > 0, plain(tokens, prompt, TEXT[:, [k]]), 0).sum(-1)
        np.testing.assert_allclose(found.evidence.alone_bk[:, k], alone, atol=1e-4)
        others = TEXT[:, [i for i in range(K) if i != k]]
        without = np.where(tokens > 0, plain(tokens, prompt, others), 0).sum(-1)
        lost = found.evidence.left_out_bk[:, k]
        np.testing.assert_allclose(lost, together - without, atol=1e-4)
    assert (found.evidence.attention_bk > 0).all()
