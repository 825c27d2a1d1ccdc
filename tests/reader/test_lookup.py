"""Drafts from the source never change what greedy decoding writes; they only save calls."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec

from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import (
    STANDARD_RULES,
    MeshConfig,
    activate,
    make_mesh,
    param_shardings,
)
from atlas_jax.reader import fid
from atlas_jax.reader.generate import Generated, GenerationConfig, generate
from atlas_jax.reader.inputs import join_inputs
from atlas_jax.reader.lookup import draft
from atlas_jax.reader.t5 import T5, copyable
from tests.reader.small import PAIR, config, random_params

LONGEST, ABSENT = 9, 999
PROMPTS = np.array([[0, 0], [7, 9], [5, 0], [11, 12], [0, 0], [6, 0], [8, 8], [0, 0]], np.int32)
ROWS = len(PROMPTS)
_rng = np.random.default_rng(3)
TOKENS = _rng.integers(3, 24, (ROWS, 2, 8)).astype(np.int32)
TOKENS[1, 1] = 0
TOKENS[2, :, 5:] = 0
START = 2
T5_PLAIN, T5_SCANNED = T5(config()), T5(config(scan_layers=True))
POINTER = T5(dataclasses.replace(PAIR, vocab_size=24, num_decoder_layers=2, start_id=START))
PAIRS = join_inputs(
    TOKENS[:, 0, :3], TOKENS, np.ones((ROWS, 2), bool), length=14, eos_id=1, start_id=START
)


@functools.partial(jax.jit, static_argnums=(0, 1))
def decoded(
    model: T5, settings: GenerationConfig, params: Any, tokens: Any, prompt: Any, source: Any
) -> Generated:
    enc = fid.encode(model, params, tokens)
    b, k, length, d = enc.shape
    mask = (tokens != 0).reshape(b, k * length)
    fused = enc.reshape(b, k * length, d)
    return generate(model, params, fused, mask, settings, None, prompt, source)


def read_by(model: T5) -> tuple[Any, Any]:
    """Reader inputs, and their tokens that may be copied."""
    tokens = PAIRS if model is POINTER else TOKENS
    return tokens, np.asarray(copyable(jnp.asarray(tokens), model.config)).reshape(ROWS, -1)


def quoting(text: np.ndarray, source: np.ndarray, seed: int) -> np.ndarray:
    """A source in which each text stands, more or less of it wrong, behind other tokens.

    So texts agree with long drafts, with parts of drafts, and with none of a draft.
    """
    rng = np.random.default_rng(seed)
    wrong = rng.random(text.shape) < np.linspace(0, 0.6, len(text))[:, None]
    quoted = np.where(wrong, rng.integers(1, 24, text.shape), text)
    return np.concatenate([source[:, : -text.shape[1]], quoted], axis=1).astype(np.int32)


def copying(params: Any) -> Any:
    """A pointer's parameters, changed to copy on: the gate shut, the next token much likelier."""
    pointer = params["decoder"]["pointer"]
    gate, go_on = (jax.tree.map(np.zeros_like, pointer[name]) for name in ("gate", "go_on"))
    gate["bias"][:] = -20
    go_on["bias"][:] = 4, 8, 20
    pointer = {**pointer, "gate": gate, "go_on": go_on}
    return {**params, "decoder": {**params["decoder"], "pointer": pointer}}


@pytest.mark.parametrize("model", [T5_PLAIN, T5_SCANNED, POINTER], ids=["t5", "scanned", "pointer"])
@pytest.mark.parametrize(
    ("eos_id", "min_length", "prompt"),
    [(ABSENT, 0, None), (5, 0, PROMPTS), (7, 3, PROMPTS)],
    ids=["to the limit", "ends", "least length"],
)
def test_the_texts_are_those_of_greedy_decoding(
    model: T5, eos_id: int, min_length: int, prompt: Any
) -> None:
    tokens, own = read_by(model)
    settings = GenerationConfig(max_length=LONGEST, eos_id=eos_id, min_length=min_length)
    saved, ended_in_draft = 0, 0
    for seed in range(6):
        params = random_params(model, seed)
        if model is POINTER and seed % 2:
            params = copying(params)
        expected = decoded(model, settings, params, tokens, prompt, own)
        # Only a pointer reads the tokens themselves; for it the drafts come from its passages.
        text = np.asarray(expected.tokens_bt)
        source = own if model is POINTER else quoting(text, own, seed)
        for drafted in (1, 5):
            looking = dataclasses.replace(settings, lookup_tokens=drafted)
            ours = decoded(model, looking, params, tokens, prompt, source)
            np.testing.assert_array_equal(ours.tokens_bt, expected.tokens_bt)
            np.testing.assert_allclose(ours.scores_b, expected.scores_b, rtol=1e-4, atol=1e-3)
            assert (np.asarray(ours.calls_b) <= np.asarray(expected.calls_b)).all()
            apart = np.asarray(expected.calls_b) - np.asarray(ours.calls_b)
            saved += apart.sum()
            ended_in_draft += ((text == eos_id).any(axis=1) & (apart > 0)).sum()
            if model is not POINTER and prompt is None:
                assert len(set(np.asarray(ours.calls_b).tolist())) > 1  # rows go their own ways
    assert saved > 0
    if eos_id != ABSENT:
        assert ended_in_draft > 0


def test_a_pointer_that_copies_saves_calls() -> None:
    tokens, own = read_by(POINTER)
    params = copying(random_params(POINTER, 1))
    settings = GenerationConfig(max_length=LONGEST, eos_id=ABSENT)
    expected = decoded(POINTER, settings, params, tokens, None, own)
    looking = dataclasses.replace(settings, lookup_tokens=4)
    ours = decoded(POINTER, looking, params, tokens, None, own)
    np.testing.assert_array_equal(ours.tokens_bt, expected.tokens_bt)
    assert np.asarray(expected.calls_b).tolist() == [LONGEST] * ROWS
    assert np.mean(ours.calls_b) < 2 / 3 * LONGEST


def test_a_prompt_is_read_in_one_call() -> None:
    tokens, own = read_by(T5_PLAIN)
    settings = GenerationConfig(max_length=1, eos_id=ABSENT, lookup_tokens=3)
    params = random_params(T5_PLAIN)
    ours = decoded(T5_PLAIN, settings, params, tokens, PROMPTS, 0 * own)
    assert np.asarray(ours.calls_b).tolist() == [1] * ROWS
    plain = dataclasses.replace(settings, lookup_tokens=0)
    expected = decoded(T5_PLAIN, plain, params, tokens, PROMPTS, own)
    np.testing.assert_array_equal(ours.tokens_bt, expected.tokens_bt)
    assert np.asarray(expected.calls_b).tolist() == (1 + (PROMPTS > 0).sum(1)).tolist()


@pytest.mark.parametrize("model", [T5_PLAIN, T5_SCANNED], ids=["unrolled", "scanned"])
def test_eight_devices_write_what_one_writes(model: T5) -> None:
    tokens, own = read_by(model)
    params = random_params(model)
    settings = GenerationConfig(max_length=LONGEST, eos_id=5, lookup_tokens=4)
    plain = dataclasses.replace(settings, lookup_tokens=0)
    source = quoting(np.asarray(decoded(model, plain, params, tokens, None, own)[0]), own, 0)
    expected = decoded(model, settings, params, tokens, None, source)
    mesh = make_mesh(MeshConfig(data=4, model=2))
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens[:1, 0], tokens[:1, 0])["params"]
    assert meta.unbox(boxed)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with activate(mesh, STANDARD_RULES):
        placed = jax.device_put(params, param_shardings(boxed, mesh, STANDARD_RULES))
        data = [jax.device_put(x, rows) for x in (tokens, source)]
        ours = decoded(model, settings, placed, data[0], None, data[1])
    np.testing.assert_array_equal(ours.tokens_bt, expected.tokens_bt)
    np.testing.assert_array_equal(ours.calls_b, expected.calls_b)
    np.testing.assert_allclose(ours.scores_b, expected.scores_b, rtol=1e-4, atol=1e-4)


def by_hand(source: list[int], text: list[int], d: int) -> list[int]:
    """The draft of one text in plain Python."""
    best, place = 0, None
    for p in range(1, len(source) + 1):
        matched = 0
        while matched < min(3, len(text), p) and source[p - 1 - matched] == text[-1 - matched] != 0:
            matched += 1
        if matched > best and p < len(source):
            best, place = matched, p
    return [0] * d if place is None else (source[place : place + d] + [0] * d)[:d]


def test_a_draft_follows_the_longest_match_and_of_equal_ones_the_first() -> None:
    rng = np.random.default_rng(5)
    source = rng.integers(0, 5, (200, 12)).astype(np.int32)  # few tokens, so many matches
    written = rng.integers(0, 5, (200, 6)).astype(np.int32)
    lengths = rng.integers(0, 7, 200).astype(np.int32)
    ours = jax.jit(draft, static_argnums=3)(source, written, lengths, 3)
    expected = [
        by_hand(s.tolist(), w[:n].tolist(), 3)
        for s, w, n in zip(source, written, lengths, strict=True)
    ]
    np.testing.assert_array_equal(ours, expected)
    assert sum(map(any, expected)) > 100


@pytest.mark.parametrize("method", ["beam", "sample"])
def test_drafts_are_for_greedy_decoding(method: Any) -> None:
    with pytest.raises(
        UserError, match=rf"GenerationConfig.lookup_tokens = 4: must be 0 .*method = '{method}'"
    ):
        GenerationConfig(lookup_tokens=4, method=method)
    assert GenerationConfig(lookup_tokens=4).by(method) == GenerationConfig(method=method)
    assert GenerationConfig(lookup_tokens=4).by("greedy").lookup_tokens == 4


def test_drafts_need_the_tokens_of_the_source() -> None:
    with pytest.raises(ValueError, match="lookup_tokens needs copyable_bs"):
        decoded(
            T5_PLAIN, GenerationConfig(lookup_tokens=2), random_params(T5_PLAIN), TOKENS, None, None
        )


def test_experts_read_one_token_a_call() -> None:
    model = T5(config(num_experts=2))
    with pytest.raises(UserError, match=r"lookup_tokens = 2: must be 0 with ReaderConfig.num_exp"):
        decoded(
            model,
            GenerationConfig(lookup_tokens=2),
            random_params(model),
            TOKENS,
            None,
            TOKENS.reshape(ROWS, -1),
        )
