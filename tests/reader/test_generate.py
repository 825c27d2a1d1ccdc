"""Decoding: what sampling may choose, when it stops, and what is refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.reader.generate import GenerationConfig, generate, restrict
from atlas_jax.reader.t5 import T5
from tests.reader.small import config, passages, random_params

TOKENS, _ = passages()
SOURCE = TOKENS.reshape(3, -1)
MODEL = T5(config())


@functools.cache
def params() -> Any:
    return random_params(MODEL, seed=2)


def decode(model: T5 = MODEL, key: int = 0, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    @jax.jit
    def whole(params: Any, key: jax.Array) -> Any:
        encoded = model.apply({"params": params}, SOURCE, method="encode")
        return generate(model, params, encoded, SOURCE > 0, GenerationConfig(**settings), key)[:2]

    tokens, scores = whole(params(), jax.random.key(key))
    return np.asarray(tokens), np.asarray(scores)


@functools.cache
def greedy(max_length: int = 8, eos_id: int = 999) -> tuple[np.ndarray, np.ndarray]:
    return decode(max_length=max_length, eos_id=eos_id)


def test_scores_are_log_probabilities_of_the_tokens() -> None:
    tokens, scores = greedy()
    inputs = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    logits = jax.jit(MODEL.apply)({"params": params()}, SOURCE, inputs)
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    np.testing.assert_array_equal(logprobs.argmax(-1), tokens)
    np.testing.assert_allclose(logprobs.max(-1).sum(-1), scores, atol=1e-4)


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_the_loop_ends_with_its_last_row(method: str) -> None:
    free, _ = greedy()
    eos_id = int(free[0, 0])
    steps: list[int] = []

    class Counting(T5):
        def step(self, tokens_n: Any, state: Any) -> Any:
            jax.debug.callback(lambda: steps.append(1))
            return super().step(tokens_n, state)

    settings: dict[str, Any] = {"max_length": 8, "eos_id": eos_id, "method": method}
    if method == "beam":
        settings |= {"num_beams": 2, "early_stopping": True, "length_penalty": 0.0}
    tokens, _ = decode(Counting(config()), **settings)
    jax.effects_barrier()
    ended = (tokens == eos_id).any(1)
    lengths = np.where(ended, (tokens == eos_id).argmax(1) + 1, 8)
    if method == "greedy":
        assert len(steps) == lengths.max()
    else:  # a better hypothesis may have ended before the loop did
        assert lengths.max() <= len(steps) <= 8
    for row, length in zip(tokens, lengths, strict=True):
        assert (row[length:] == 0).all()


def test_all_rows_ending_at_once_takes_one_step() -> None:
    """Every row reads the same source, so all end with the same first token."""
    steps: list[int] = []

    class Counting(T5):
        def step(self, tokens_n: Any, state: Any) -> Any:
            jax.debug.callback(lambda: steps.append(1))
            return super().step(tokens_n, state)

    model = Counting(config())
    same = np.repeat(SOURCE[:1], 4, axis=0)
    encoded = MODEL.apply({"params": params()}, same, method="encode")
    settings = GenerationConfig(max_length=8, eos_id=int(greedy()[0][0, 0]))
    tokens, *_ = generate(model, params(), encoded, same > 0, settings)
    jax.effects_barrier()
    assert len(steps) == 1
    assert (np.asarray(tokens)[:, 1:] == 0).all()


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_beam_search_ends_before_the_last_position(early_stopping: Any) -> None:
    """Every row reads the same source, and its likeliest first token ends."""
    steps: list[int] = []

    class Counting(T5):
        def step(self, tokens_n: Any, state: Any) -> Any:
            jax.debug.callback(lambda: steps.append(1))
            return super().step(tokens_n, state)

    same = np.repeat(SOURCE[:1], 4, axis=0)
    eos_id = int(greedy()[0][0, 0])
    settings = GenerationConfig(
        max_length=8, eos_id=eos_id, method="beam", num_beams=2, early_stopping=early_stopping,
        length_penalty=0.0,
    )  # fmt: skip
    encoded = MODEL.apply({"params": params()}, same, method="encode")
    tokens, *_ = generate(Counting(config()), params(), encoded, same > 0, settings)
    jax.effects_barrier()
    assert 1 < len(steps) < settings.max_length  # the second beam ends after the first
    assert (np.asarray(tokens) == [eos_id] + 7 * [0]).all()


def by_the_rules_of_4_18(
    log_probs: Any, beams: int, length: int, eos_id: int, penalty: float
) -> tuple[float, tuple[int, ...]]:
    """Beam search as transformers 4.18 has it, one query, in plain Python.

    An ended hypothesis of n tokens is divided by n ** penalty. Those that run when the length is
    used up are cut off there, and divided by (n + 1) ** penalty.
    """
    running, finished = [(0.0, ())], []

    def finish(score: float, tokens: tuple[int, ...]) -> None:
        finished.append((score, tokens))
        finished.sort(key=lambda one: -one[0])
        del finished[beams:]

    for n in range(1, length + 1):
        candidates = [
            (score + value, (*tokens, token))
            for score, tokens in running
            for token, value in enumerate(log_probs(tokens))
        ]
        candidates.sort(key=lambda one: -one[0])
        running = []
        for rank, (score, tokens) in enumerate(candidates[: 2 * beams]):
            if tokens[-1] != eos_id:
                running.append((score, tokens))
            elif rank < beams:
                finish(score / n**penalty, tokens)
        running = running[:beams]
        if len(finished) == beams and finished[-1][0] >= candidates[0][0] / n**penalty:
            return finished[0]
    for score, tokens in running:
        finish(score / (length + 1) ** penalty, tokens)
    return finished[0]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("eos_id", [1, 7, 999])
def test_beams_follow_the_rules_of_the_version_that_is_asked_for(
    penalty: float, eos_id: int
) -> None:
    length, beams = 5, 3
    forward = jax.jit(
        lambda params, source, inputs: MODEL.apply({"params": params}, source, inputs)
    )
    settings = {"method": "beam", "num_beams": beams, "max_length": length, "eos_id": eos_id,
                "length_penalty": penalty}  # fmt: skip
    tokens, scores = decode(beam_rules="v4.18", **settings)
    newest, newest_scores = decode(**settings)
    for row in range(len(SOURCE)):

        def log_probs(before: tuple[int, ...], row: int = row) -> np.ndarray:
            inputs = np.zeros((1, length), np.int32)
            inputs[0, 1 : len(before) + 1] = before
            logits = forward(params(), SOURCE[row : row + 1], inputs)[0, len(before)]
            return np.asarray(jax.nn.log_softmax(logits))

        score, expected = by_the_rules_of_4_18(log_probs, beams, length, eos_id, penalty)
        assert tokens[row, : len(expected)].tolist() == list(expected)
        np.testing.assert_allclose(scores[row], score, rtol=1e-4)
    if eos_id == 999:  # none ends, all are cut off: only what they are divided by differs
        np.testing.assert_array_equal(tokens, newest)
        shorter = (length / (length + 1)) ** penalty
        np.testing.assert_allclose(scores, newest_scores * shorter, rtol=1e-5)


def test_one_beam_is_greedy() -> None:
    tokens, scores = decode(
        method="beam", num_beams=1, length_penalty=0.0, max_length=8, eos_id=999
    )
    np.testing.assert_array_equal(tokens, greedy()[0])
    np.testing.assert_allclose(scores, greedy()[1], atol=1e-4)


@pytest.mark.parametrize("restriction", [{"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_from_the_likeliest_alone_is_greedy(restriction: dict[str, Any]) -> None:
    tokens, scores = decode(method="sample", max_length=8, eos_id=999, **restriction)
    np.testing.assert_array_equal(tokens, greedy()[0])
    np.testing.assert_allclose(scores, greedy()[1], atol=1e-4)


def test_sampling_repeats_with_its_key() -> None:
    first, _ = decode(method="sample", max_length=8, key=1)
    np.testing.assert_array_equal(first, decode(method="sample", max_length=8, key=1)[0])
    assert (first != decode(method="sample", max_length=8, key=2)[0]).any()


def test_first_tokens_are_sampled_with_their_probabilities() -> None:
    rows = 4000
    source = np.repeat(SOURCE[:1], rows, axis=0)
    encoded = MODEL.apply({"params": params()}, SOURCE[:1], method="encode")
    settings = GenerationConfig(max_length=1, method="sample", temperature=2.0, top_k=5, eos_id=999)
    tokens, *_ = jax.jit(
        lambda params, encoded: generate(
            MODEL,
            params,
            jnp.repeat(encoded, rows, axis=0),
            source > 0,
            settings,
            jax.random.key(0),
        )
    )(params(), encoded)
    logits = jax.jit(MODEL.apply)({"params": params()}, SOURCE[:1], np.zeros((1, 1), np.int32))[
        0, 0
    ]
    order = np.argsort(-np.asarray(logits))
    expected = np.zeros(logits.shape)
    expected[order[:5]] = jax.nn.softmax(logits[order[:5]] / 2.0)
    counted = np.bincount(np.asarray(tokens)[:, 0], minlength=len(expected)) / rows
    assert set(np.flatnonzero(counted)) <= set(order[:5].tolist())
    np.testing.assert_allclose(counted, expected, atol=0.03)  # four standard deviations


def test_restrict_keeps_top_k_then_top_p() -> None:
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.3, 0.15]]))

    def kept(top_k: int, top_p: float) -> list[int]:
        return np.flatnonzero(np.isfinite(restrict(logits, top_k, top_p))[0]).tolist()

    assert kept(0, 1.0) == kept(5, 1.0) == kept(9, 1.0) == [0, 1, 2, 3, 4]
    assert kept(2, 1.0) == [1, 3]
    assert kept(0, 0.35) == [1]
    assert kept(0, 0.45) == kept(0, 0.69) == [1, 3]  # the one that reaches it is in
    assert kept(0, 0.71) == [1, 3, 4]
    # Renormalised to (4/7, 3/7): 0.55 is reached by the first alone, in the whole not.
    assert kept(2, 0.55) == [1]
    assert kept(0, 0.55) == [1, 3]


def test_sampling_without_a_key_is_refused() -> None:
    encoded = np.zeros((*SOURCE.shape, config().emb_dim), np.float32)
    with pytest.raises(ValueError, match="needs a key"):
        generate(MODEL, params(), encoded, SOURCE > 0, GenerationConfig(method="sample"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 0}, "GenerationConfig.max_length = 0: expected a whole number from 1 to"),
        ({"method": "best"}, "method = 'best': expected 'greedy' or 'beam' or 'sample'"),
        ({"num_beams": 0}, "num_beams = 0: expected a whole number from 1 to"),
        ({"early_stopping": "now"}, "early_stopping = 'now': expected True or False or 'never'"),
        ({"temperature": 0.0}, "temperature = 0.0: expected a finite number, more than 0"),
        ({"top_k": -1}, "top_k = -1: expected a whole number, 0 or more"),
        ({"top_p": 0.0}, "top_p = 0.0: expected a finite number, more than 0, at most 1"),
        ({"seed": -1}, "seed = -1: expected a whole number from 0 to 4,294,967,295"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerationConfig(**settings)
