"""The reader against Hugging Face: recorded numbers, and live where torch is installed."""

import dataclasses
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import pytest

from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.generate import GenerationConfig, generate
from atlas_jax.reader.scanned import stack_layers
from atlas_jax.reader.t5 import T5
from tests.goldens import make_t5_goldens as goldens

TOLERANCE = 1e-4
BEAMS = range(len(goldens.BEAM_SETTINGS))


def reader(version: str, sizes: dict[str, int] = goldens.SIZES) -> T5:
    return T5(ReaderConfig(**goldens.config_fields(version, sizes)))


def nested(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    return flax.traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module", params=goldens.VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def golden(version: str) -> dict[str, np.ndarray]:
    with np.load(goldens.FOLDER / f"t5_{version}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def params(golden: dict[str, np.ndarray]) -> dict[str, Any]:
    return nested(
        {k.removeprefix("params/"): v for k, v in golden.items() if k.startswith("params/")}
    )


def run(model: T5, params: Any, golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    source, decoder_input = golden["source"], golden["decoder_input"]

    @jax.jit
    def both(params: Any) -> Any:
        encoded = model.apply({"params": params}, source, method="encode")
        states, mass = model.apply(
            {"params": params},
            encoded,
            (source > 0)[:, None],
            decoder_input[:, None],
            golden["weight"],
            method="decode_states",
        )
        logits = model.apply({"params": params}, states[:, 0], method="logits")
        return {
            "encoder_states": encoded,
            "decoder_states": states[:, 0],
            "logits": logits,
            "mass": mass,
        }

    return jax.tree.map(np.asarray, both(params))


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    real = theirs["source"] > 0
    for name in ("encoder_states", "mass"):  # at padding a state means nothing
        np.testing.assert_allclose(ours[name][real], theirs[name][real], rtol=0, atol=TOLERANCE)
    for name in ("decoder_states", "logits"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=TOLERANCE)
    assert ours["logits"].dtype == np.float32


def decode(
    model: T5, params: Any, source: np.ndarray, eos_id: int, beams: dict[str, Any] | None
) -> tuple[np.ndarray, np.ndarray]:
    method: dict[str, Any] = {"method": "beam", **beams} if beams else {"method": "greedy"}
    settings = GenerationConfig(max_length=goldens.MAX_LENGTH, eos_id=eos_id, **method)

    @jax.jit
    def whole(params: Any) -> Any:
        encoded = model.apply({"params": params}, source, method="encode")
        return generate(model, params, encoded, source > 0, settings)[:2]

    tokens, scores = whole(params)
    return np.asarray(tokens), np.asarray(scores)


def test_states_logits_and_attention_mass(version: str, params: Any, golden: Any) -> None:
    compare(run(reader(version), params, golden), golden)


def test_greedy_decoding_is_identical(version: str, params: Any, golden: Any) -> None:
    tokens, scores = decode(reader(version), params, golden["source"], int(golden["eos_id"]), None)
    np.testing.assert_array_equal(tokens, golden["greedy/tokens"])
    np.testing.assert_allclose(scores, golden["greedy/scores"], rtol=1e-5, atol=TOLERANCE)


@pytest.mark.parametrize("number", BEAMS)
def test_beam_search_is_identical(version: str, params: Any, golden: Any, number: int) -> None:
    model = reader(version)
    if number % 2:  # the scanned form has its own way of reordering caches
        model = T5(dataclasses.replace(model.config, scan_layers=True))
        params = stack_layers(params)
    settings = goldens.BEAM_SETTINGS[number]
    tokens, scores = decode(model, params, golden["source"], int(golden["eos_id"]), settings)
    np.testing.assert_array_equal(tokens, golden[f"beam_{number}/tokens"])
    np.testing.assert_allclose(scores, golden[f"beam_{number}/scores"], rtol=1e-5, atol=TOLERANCE)


def test_goldens_end_apart_and_differ_by_setting(golden: Any) -> None:
    """Otherwise they would not show what they are for."""
    names = ["greedy", *(f"beam_{i}" for i in BEAMS)]
    all_tokens = [golden[f"{name}/tokens"] for name in names]
    lengths = [(tokens != 0).sum(1) for tokens in all_tokens]
    assert len(set(np.concatenate(lengths).tolist())) >= 3
    assert len({tokens.tobytes() for tokens in all_tokens}) >= 4


@pytest.mark.parity
@pytest.mark.slow
def test_live_against_transformers(version: str) -> None:
    pytest.importorskip("torch", reason="needs the extra [parity]")
    pytest.importorskip("transformers", reason="needs the extra [parity]")
    sizes = {
        "vocab_size": 19,
        "emb_dim": 14,
        "num_heads": 5,
        "head_dim": 3,
        "mlp_dim": 9,
        "num_encoder_layers": 3,
        "num_decoder_layers": 1,
    }
    theirs = goldens.make_model(version, sizes, seed=8)
    source, decoder_input = goldens.random_tokens(sizes, seed=8)
    weight = np.ones(decoder_input.shape, np.float32)
    inputs = {"source": source, "decoder_input": decoder_input, "weight": weight}
    params = nested(goldens.convert(theirs))
    model = reader(version, sizes)
    expected = goldens.run(theirs, source, decoder_input, weight)
    compare(run(model, params, inputs), {**inputs, **expected})

    eos_id = goldens.choose_eos(theirs, source)
    for beams in (None, goldens.BEAM_SETTINGS[0]):
        tokens, scores = decode(model, params, source, eos_id, beams)
        their_tokens, their_scores = goldens.generate(theirs, source, eos_id, beams)
        np.testing.assert_array_equal(tokens, their_tokens)
        np.testing.assert_allclose(scores, their_scores, rtol=1e-5, atol=TOLERANCE)
