"""Answers from packed passages are those from padded ones, in every way of answering."""

from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.answering.answers import Answers, Reading, make_answer
from atlas_jax.answering.packed_rows import packed_passages, packed_rows
from atlas_jax.answering.writer import Writer
from atlas_jax.core import partitioning
from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.errors import UserError
from atlas_jax.core.packing import pack
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.core.types import Batch, Choices, Passages
from atlas_jax.corpus.config import FROM_LENGTHS, ReadConfig
from atlas_jax.models.parameters import Models
from atlas_jax.reader import inputs
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.reader.t5 import T5
from tests.answering.test_answers import PARAMS, READER
from tests.reader.small import PAIR
from tests.training.models import READER_VOCAB, random_batch, tiny_models

ROWS, K, LENGTH, PACKED, LONGEST = 8, 5, 32, 3, 14
BATCH = random_batch(rows=ROWS)
READINGS = {
    "greedy": Reading(K, LENGTH, explains=True, scores_targets=True),
    "beam": Reading(K, LENGTH),
    "sample": Reading(K, LENGTH),
    "choices": Reading(K, LENGTH, chooses=True, explains=True),
}


def passages(longest: int, seed: int = 0) -> Passages:
    """Of 0 to `longest` tokens; the last question has three.

    With a question of 3 to 6 tokens two of 5 tokens share a row, and two of 14 do not.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, READER_VOCAB, (ROWS, K, LONGEST))
    lengths = rng.integers(0, longest + 1, (ROWS, K, 1))
    lengths[0] = longest
    tokens = np.where(np.arange(LONGEST) < lengths, tokens, 0).astype(np.int32)
    mask = np.ones((ROWS, K), bool)
    mask[-1, 3:] = False
    return Passages(
        rows_bk=np.zeros((ROWS, K), np.int32),
        scores_bk=np.zeros((ROWS, K), np.float32),
        reader_tokens_bkl=tokens,
        retriever_tokens_bkm=tokens,
        mask_bk=mask,
    )


FITTING, OVERFULL = passages(5), passages(LONGEST)


def batch(way: str) -> Batch:
    if way != "choices":
        return BATCH
    rng = np.random.default_rng(2)
    tokens = rng.integers(3, READER_VOCAB, (ROWS, 3, 4)).astype(np.int32)
    weights = np.ones(tokens.shape, np.float32)
    return BATCH.replace(choices=Choices(tokens, weights))  # type: ignore[attr-defined]


def answers(way: str, mesh: Any, packed: int) -> list[Answers]:
    """Of passages that fit and of some that do not, by one program."""
    method: Any = "greedy" if way == "choices" else way
    generation = GenerationConfig(max_length=5, method=method, num_beams=3)
    reading = READINGS[way]
    reading = Reading(**{**vars(reading), "packed_rows": packed})
    answer: Any = make_answer(READER, generation, reading, mesh)
    found = [answer({"reader": PARAMS}, batch(way), given, 7) for given in (FITTING, OVERFULL)]
    assert answer._cache_size() == 1
    return jax.device_get(found)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("way", READINGS)
def test_packed_answers_are_the_padded_ones(way: str, devices: int) -> None:
    mesh = partitioning.make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    with partitioning.activate(mesh):
        padded, packed = answers(way, mesh, 0), answers(way, mesh, PACKED)
    for ours, theirs in zip(packed, padded, strict=True):
        np.testing.assert_array_equal(ours.tokens_bt, theirs.tokens_bt)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs
        )


def test_some_passages_fit_and_some_do_not() -> None:
    joined = jax.jit(inputs.join_inputs, static_argnums=(3, 4))
    for given, fits in ((FITTING, True), (OVERFULL, False)):
        read = (BATCH.query_tokens_bq, given.reader_tokens_bkl, given.mask_bk, LENGTH, 1)
        assert bool(pack(joined(*read), PACKED)[1]) is fits


def test_a_writer_packs_what_fits() -> None:
    mesh = partitioning.make_mesh(MeshConfig(), jax.devices()[:1])
    generation = GenerationConfig(max_length=5)
    with partitioning.activate(mesh):
        padded = Writer(READER, generation, Reading(K, LENGTH), mesh)
        packed = Writer(READER, generation, Reading(K, LENGTH, packed_rows=PACKED), mesh)
        for given, programs in ((FITTING, 1), (OVERFULL, 2), (FITTING, 2)):
            asked = ({"reader": PARAMS}, BATCH, given)
            seen: list[np.ndarray] = []
            ours = packed(*asked, explains=True, on_tokens=seen.append)
            theirs = padded(*asked, explains=True)
            np.testing.assert_array_equal(ours.tokens_bt, theirs.tokens_bt)
            np.testing.assert_array_equal(seen[-1], theirs.tokens_bt)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs
            )
            assert packed._begin._cache_size() == programs


def test_the_rows_follow_from_the_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    models = tiny_models()
    questions, passage_lengths = np.array([10]), np.array([21, 69])

    def rows(k: int, told: int = FROM_LENGTHS, models: Models = models, batch: int = 1) -> int:
        read = ReadConfig(k=20, reader_length=128, packed_rows=told)
        return packed_rows(read, models, k, batch, lambda: (questions, passage_lengths))

    # Inputs of 32 and 80 tokens: a long and a short one share a row, and then four short ones.
    long = np.random.default_rng(1).binomial(10, 0.5, 100_000)
    needed = long + np.ceil(np.maximum(0, 10 - 2 * long) / 4)
    fits = np.mean(needed[:, None] <= np.arange(1, 11), axis=0)
    for batch in (1, 4):
        expected = 1 + np.argmin(fits**batch * np.arange(1, 11) + (1 - fits**batch) * 10)
        assert rows(10, batch=batch) == expected
    assert rows(10, batch=10_000) == 0 and "of its own" in capsys.readouterr().err
    passage_lengths = np.array([21])
    assert rows(10) == 3
    told = "10 passages a question, 32 of 128 tokens each on average: they share 3 rows "
    assert capsys.readouterr().err == told + "(StepConfig.packed_rows)\n"
    prompt = Models(
        models.reader, models.retriever, (("reader", DeltaConfig("prompt", length=11)),)
    )
    assert rows(10, models=prompt) == 4  # three inputs of 43 tokens in rows of 139
    assert "43 of 139 tokens" in capsys.readouterr().err
    assert (rows(10, 0), rows(1), rows(20, 6), rows(10, 6), rows(4, 6)) == (0, 0, 6, 3, 2)
    assert rows(20, 20) == 0  # as many rows as passages
    pair = Models(T5(PAIR), models.retriever)
    assert rows(10, models=pair) == 0
    with pytest.raises(UserError, match=r"StepConfig.packed_rows = 6: .* bind it to 0, or to -1"):
        rows(10, 6, pair)
    assert capsys.readouterr().err == ""


def test_the_rows_of_the_tower_follow_from_the_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    def rows(told: int, passages: int = 10, reader: int = FROM_LENGTHS) -> int:
        read = ReadConfig(k=20, packed_rows=reader, packed_passages=told)
        return packed_passages(read, passages, 1, 96, lambda: np.array([32]))

    assert rows(FROM_LENGTHS) == 4  # three of 32 tokens in a row of 96
    told = "10 passages a question, 32 of 96 tokens each for the retriever on average: they share 4"
    assert capsys.readouterr().err == f"{told} rows (StepConfig.packed_passages)\n"
    assert rows(FROM_LENGTHS, reader=0) == 0  # one binding turns both off
    assert (rows(0), rows(6), rows(6, 20), rows(6, 40), rows(20, 40)) == (0, 3, 6, 12, 0)
    assert capsys.readouterr().err == ""
