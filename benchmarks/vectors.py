"""Vectors of real text: passages and questions embedded, and many more that lie as they do."""

import jax
import numpy as np

from atlas_jax.core.compiler import encoder_options
from atlas_jax.core.jsonl import read_jsonl
from atlas_jax.index.embed import embed_corpus
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.assembly import load_retriever
from atlas_jax.models.config import ModelConfig, ModelSpec
from atlas_jax.models.towers import embed

_ROWS = 65_536  # made at a time


def embedded(
    model: str, passages: str, questions: str, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Passages and questions as a model folder's two towers embed them: [n, e] and [q, e] float32.

    Args:
      model: a model folder with a retriever.
      passages: jsonl {title?, section?, text}, may be .gz.
      questions: jsonl {question}, may be .gz.
      most: questions that are embedded, the first ones; None = all.
    """
    config = ModelConfig(retriever=model)
    dual, params, tokenizer = load_retriever(ModelSpec(config))
    formats = StoreConfig()
    texts = [
        formats.text("retriever", {"title": "", "section": "", **record})
        for _, record in read_jsonl(passages)
    ]
    asked = [record["question"] for _, record in read_jsonl(questions)][:most]

    def vectors(texts: list[str], tower: str) -> np.ndarray:
        encoded = tokenizer.encode_batch(texts, True)
        length = formats.fitted(dual.config.max_length).retriever_length
        tokens = tokenizer.pad_to(encoded, length)
        function = jax.jit(
            lambda tokens_nm: embed(dual, params, tower, tokens_nm),
            compiler_options=encoder_options(),
        )
        return np.asarray(embed_corpus(function, tokens, 64))

    return vectors(texts, "embed_passage"), vectors(asked, "embed_query")


def repeated(base_me: np.ndarray, out_ne: np.ndarray, noise: float, seed: int = 0) -> None:
    """Fill `out_ne` with repetitions of `base_me`, each with noise that is as long as it is told.

    The noise is the difference of two of the base's own vectors, so it points where real vectors
    differ, and the spectrum of the whole stays that of real text. Rows keep the length of the
    vectors that they repeat. The first m rows are the base itself; which one each of the others
    repeats is drawn, so that neighbours do not lie at equal distances.

    Args:
      base_me: vectors of real text.
      out_ne: n rows to fill, n at least m.
      noise: length of the noise as a share of the repeated vector's.
    """
    rng = np.random.default_rng(seed)
    m = len(base_me)
    length_m1 = np.linalg.norm(base_me, axis=1, keepdims=True)
    out_ne[:m] = base_me
    for start in range(m, len(out_ne), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(out_ne)))
        of, one, other = rng.integers(0, m, (3, len(rows)))
        apart = base_me[one] - base_me[other]
        apart /= np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-9)
        moved = base_me[of] + noise * length_m1[of] * apart
        moved *= length_m1[of] / np.linalg.norm(moved, axis=1, keepdims=True)
        out_ne[rows[0] : rows[-1] + 1] = moved
