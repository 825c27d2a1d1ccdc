"""An answer that is told token by token is the one that is told whole, to the bit."""

from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.answering.answers import Reading, make_answer
from atlas_jax.answering.writer import Writer
from atlas_jax.core import partitioning
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.reader.generate import GenerationConfig
from tests.answering.test_answers import LENGTH, PARAMS, PROMPT, READER, K, batch, passages

LONGEST = 6


@pytest.mark.parametrize("prompt", [None, PROMPT], ids=["plain", "prompt"])
@pytest.mark.parametrize(
    "decoding",
    [{}, {"method": "sample", "seed": 3}, {"lookup_tokens": 2}],
    ids=["greedy", "sample", "lookup"],
)
@pytest.mark.parametrize("devices", [1, 2])
def test_each_token_as_it_is_written(devices: int, decoding: Any, prompt: Any) -> None:
    generation = GenerationConfig(max_length=LONGEST, **decoding)
    mesh = partitioning.make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    with partitioning.activate(mesh):
        params, made, found = {"reader": PARAMS}, batch(prompt=prompt), passages()
        reading = Reading(K, LENGTH, explains=True)
        expected = make_answer(READER, generation, reading, mesh)(params, made, found, 7)
        writer = Writer(READER, generation, Reading(K, LENGTH), mesh)
        whole = writer(params, made, found, 7, explains=True)
        compiled: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, _seconds, **_: compiled.append(name) if "compile" in name else None
        )
        seen: list[np.ndarray] = []
        told = writer(params, made, found, 7, explains=True, on_tokens=seen.append)
        assert compiled == []  # the same programs
    expected, whole, told = jax.device_get((expected, whole, told))
    jax.tree.map(np.testing.assert_array_equal, told, whole)
    np.testing.assert_array_equal(whole.tokens_bt, expected.tokens_bt)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), whole,
                 expected)  # fmt: skip
    np.testing.assert_array_equal(seen[-1], whole.tokens_bt)
    for before, after in zip(seen, seen[1:], strict=False):
        grown = (before != after).sum(axis=1)
        assert (grown <= 1 + generation.lookup_tokens).all()
        assert (before[before > 0] == after[before > 0]).all()
    if prompt is None:
        assert len(seen) <= whole.calls_b.max()


def test_drafts_change_no_answer() -> None:
    mesh = partitioning.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with partitioning.activate(mesh):
        plain, looked_up = (
            make_answer(
                READER,
                GenerationConfig(max_length=LONGEST, lookup_tokens=drafted),
                Reading(K, LENGTH),
                mesh,
            )({"reader": PARAMS}, batch(prompt=PROMPT), passages())
            for drafted in (0, 3)
        )
    np.testing.assert_array_equal(looked_up.tokens_bt, plain.tokens_bt)
    assert (np.asarray(looked_up.calls_b) < np.asarray(plain.calls_b)).any()  # the prompts at least
