"""The kept states of passages: those that the reader computes, made once, refused for others."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.corpus.config import CorpusConfig
from atlas_jax.corpus.reader_states import PassageReader, reader_states
from atlas_jax.reader import fid, inputs
from atlas_jax.reader.t5 import T5
from tests.reader.small import PAIR, random_params

MODEL = T5(dataclasses.replace(PAIR, start_id=2))
PARAMS = random_params(MODEL)
QUERY_LENGTH, LENGTH = 3, 15
BLOCK = LENGTH - QUERY_LENGTH - 2  # start, question, end


def store(seed: int = 5) -> Any:
    """Forty passages of no token to twelve; a block has room for eight."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 120, (40, 12)).astype(np.uint16)
    lengths = rng.integers(0, 13, 40)
    lengths[:2] = 0, 12
    tokens[np.arange(12) >= lengths[:, None]] = 0
    return SimpleNamespace(count=40, reader_tokens_nl=tokens)


def states(folder: Path, told: Any, params: Any = PARAMS, length: int = LENGTH) -> np.ndarray:
    reader = PassageReader(MODEL, params, length, QUERY_LENGTH)
    found = reader_states(CorpusConfig(reader_states=str(folder)), reader)
    assert found is not None
    return found.of(told)


def test_they_are_what_the_reader_computes(tmp_path: Path) -> None:
    told = store()
    found = states(tmp_path / "kept", told).reshape(40, BLOCK, -1)
    tokens = told.reader_tokens_nl.astype(np.int32)
    expected = np.asarray(fid.encode_apart(MODEL, PARAMS, tokens, BLOCK))
    real = np.asarray(inputs.passage_blocks(tokens, BLOCK, 1, 2)) != 0
    assert real[0].sum() == 2 and real[1].all()
    np.testing.assert_allclose(found[real], expected[real], rtol=2e-3, atol=2e-3)  # float16


def test_they_are_made_once(tmp_path: Path) -> None:
    told = store()
    states(tmp_path / "kept", told)
    made = (tmp_path / "kept" / "states.npy").stat().st_mtime_ns
    states(tmp_path / "kept", told)
    assert (tmp_path / "kept" / "states.npy").stat().st_mtime_ns == made


@pytest.mark.parametrize("other", ["passages", "encoder", "length"])
def test_those_of_something_else_are_refused(tmp_path: Path, other: str) -> None:
    states(tmp_path / "kept", store())
    changed = jax.tree_util.tree_map(lambda leaf: leaf + 1, PARAMS)
    with pytest.raises(UserError, match=f"was made of another {other}"):
        states(
            tmp_path / "kept",
            store(6 if other == "passages" else 5),
            changed if other == "encoder" else PARAMS,
            LENGTH - 1 if other == "length" else LENGTH,
        )


def test_a_plain_reader_keeps_none(tmp_path: Path) -> None:
    plain = PassageReader(T5(dataclasses.replace(PAIR, apart_layers=0)), {}, LENGTH, QUERY_LENGTH)
    told = CorpusConfig(reader_states=str(tmp_path))
    with pytest.raises(UserError, match="apart_layers"):
        reader_states(told, plain)
    assert reader_states(CorpusConfig(), plain) is None
