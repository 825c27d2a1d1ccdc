"""Decoder prompts, the least length, and several targets of one source."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.reader import fid, inputs
from atlas_jax.reader.generate import GenerationConfig, generate
from atlas_jax.reader.t5 import T5
from tests.reader.small import config, passages, random_params

TOKENS, TARGETS = passages()
MODEL = T5(config())
PARAMS = random_params(MODEL, seed=2)
PROMPT = np.array([[7, 9], [5, 0], [0, 0]], np.int32)
ABSENT = 999  # an end token that never comes


def decode(prompt: np.ndarray | None = None, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    source = TOKENS.reshape(3, -1)

    @jax.jit
    def whole(params: Any) -> Any:
        encoded = MODEL.apply({"params": params}, source, method="encode")
        settled = GenerationConfig(**settings)
        return generate(MODEL, params, encoded, source > 0, settled, None, prompt)[:2]

    tokens, scores = whole(PARAMS)
    return np.asarray(tokens), np.asarray(scores)


def log_probs(decoder_tokens: np.ndarray) -> np.ndarray:
    """Of every next token, given these tokens, [3, t, v]."""
    inputs = np.pad(decoder_tokens, ((0, 0), (1, 0)))[:, :-1]
    logits = jax.jit(MODEL.apply)({"params": PARAMS}, TOKENS.reshape(3, -1), inputs)
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


def behind(prompt: np.ndarray, tokens: np.ndarray) -> list[list[int]]:
    return [
        [*(int(x) for x in p if x), *row] for p, row in zip(prompt, tokens.tolist(), strict=True)
    ]


@pytest.mark.parametrize("settings", [{}, {"method": "beam", "num_beams": 1}])
def test_what_follows_a_prompt_is_the_likeliest(settings: dict[str, Any]) -> None:
    tokens, scores = decode(PROMPT, max_length=4, eos_id=ABSENT, length_penalty=0.0, **settings)
    for row, whole in enumerate(behind(PROMPT, tokens)):
        padded = np.zeros((3, len(whole)), np.int32)
        padded[row] = whole
        found = log_probs(padded)[row]
        start = len(whole) - 4
        assert whole[start:] == found[start:].argmax(-1).tolist()
        assert scores[row] == pytest.approx(float(found[start:].max(-1).sum()), abs=1e-4)


def test_a_beam_behind_a_prompt_is_no_worse_than_greedy() -> None:
    settings: dict[str, Any] = {"max_length": 4, "eos_id": ABSENT, "length_penalty": 0.0}
    _, greedy = decode(PROMPT, **settings)
    tokens, best = decode(PROMPT, method="beam", num_beams=3, **settings)
    assert (best >= greedy - 1e-5).all()
    for row, whole in enumerate(behind(PROMPT, tokens)):
        padded = np.zeros((3, len(whole)), np.int32)
        padded[row] = whole
        found = log_probs(padded)[row][range(len(whole)), whole]
        assert best[row] == pytest.approx(float(found[-4:].sum()), abs=1e-4)


@pytest.mark.parametrize("settings", [{}, {"method": "beam", "num_beams": 2}])
def test_the_end_waits_for_the_least_length(settings: dict[str, Any]) -> None:
    free, _ = decode(max_length=5, eos_id=ABSENT)
    end = int(free[0, 0])  # the likeliest first token of row 0 is now the end
    at_once, _ = decode(max_length=5, eos_id=end)
    assert at_once[0].tolist() == [end, 0, 0, 0, 0]
    tokens, _ = decode(max_length=5, min_length=3, eos_id=end, **settings)
    assert (tokens[:, :3] != end).all()
    assert (tokens[:, :3] != 0).all()


def test_a_least_length_above_the_greatest_is_refused() -> None:
    with pytest.raises(UserError, match="min_length = 16: must be from 0 to below max_length = 16"):
        GenerationConfig(min_length=16)


def test_a_prompt_stands_before_the_target_without_a_gap() -> None:
    decoder, targets = inputs.join_prompt(jnp.asarray(PROMPT), jnp.asarray(TARGETS[:, :3]))
    assert decoder.tolist() == [[7, 9, 5, 6, 7], [5, 8, 1, 0, 0], [9, 10, 1, 0, 0]]
    assert targets.tolist() == [[0, 0, 5, 6, 7], [0, 8, 1, 0, 0], [9, 10, 1, 0, 0]]


@jax.jit
def scores_of(params: Any, decoder: Any, targets: Any) -> dict[str, jax.Array]:
    """Every kind of log-probability of the targets, [3, ., t]."""
    enc = fid.encode(MODEL, params, TOKENS)
    source = (MODEL, params, enc, TOKENS)
    given = {"decoder_bt": decoder}
    return {
        "together": fid.variant_logprobs(*source, targets[:, None], decoder[:, None]),
        "alone": fid.passage_logprobs(*source, targets, **given),
        "without": fid.leave_one_out_logprobs(*source, targets, **given),
    }


def test_scores_behind_a_prompt_are_those_of_the_later_tokens() -> None:
    # Prompt and target in one are a target without prompt: its last tokens score the same.
    decoder, targets = inputs.join_prompt(jnp.asarray(PROMPT), jnp.asarray(TARGETS))
    ours = scores_of(PARAMS, decoder, targets)
    plain = scores_of(PARAMS, decoder, decoder)
    real = np.asarray(targets) > 0
    for name, values in ours.items():
        at = np.broadcast_to(real[:, None], values.shape)
        np.testing.assert_allclose(values[at], plain[name][at], atol=1e-5)


def test_variants_score_as_if_each_were_alone() -> None:
    enc = jax.jit(fid.encode, static_argnums=0)(MODEL, PARAMS, TOKENS)
    several = np.stack([TARGETS, np.roll(TARGETS, 1, axis=0)], axis=1)
    score = jax.jit(fid.variant_logprobs, static_argnums=0)
    together = score(MODEL, PARAMS, enc, TOKENS, several, several)
    for place in range(2):
        one = several[:, place : place + 1]
        alone = score(MODEL, PARAMS, enc, TOKENS, one, one)
        np.testing.assert_allclose(together[:, place], alone[:, 0], atol=1e-5)
