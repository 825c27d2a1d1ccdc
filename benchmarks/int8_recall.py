"""How many of the exact k best an index in fewer bits finds, with and without re-ranking.

    python -m benchmarks.int8_recall [--passages passages.jsonl --questions test.jsonl]

Exact is a float32 search of float32 rows. Re-ranked: L are searched and the k best kept by
float32 scores, as StepConfig.rerank does. Random rows lie around random centres and are as wide as
BERT's; with the two files, rows and queries are those of the model folder --model.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from atlas_jax.core.types import DeviceIndex
from atlas_jax.demo.paths import nano_checkpoint
from atlas_jax.index.exact import exact_search
from atlas_jax.index.int8 import stored_as
from benchmarks.vectors import embedded

K = 20
DTYPES = ("bfloat16", "int8")


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", help="jsonl {title, section?, text}, may be .gz")
    parser.add_argument("--questions", help="jsonl {question}, may be .gz")
    parser.add_argument("--model", default=str(nano_checkpoint()))
    parser.add_argument("--rows", type=int, default=50_000, help="of the random index")
    parser.add_argument("--queries", type=int, default=500)
    flags = parser.parse_args(argv)
    print(f"| rows | index | recall@{K} | re-ranked, L={K + K // 2} | L={2 * K} | L={4 * K} |")
    print("|---|---|---|---|---|---|")
    _table(f"random, {flags.rows} x 768", *_random(flags.rows, flags.queries))
    if flags.passages and flags.questions:
        texts = flags.model, flags.passages, flags.questions
        _table(Path(flags.model).name, *embedded(*texts, flags.queries))
    return 0


def _table(name: str, rows_ne: np.ndarray, query_be: np.ndarray) -> None:
    exact_bk = _search(rows_ne, query_be, K)
    for dtype in DTYPES:
        wide_bl = _search(stored_as(rows_ne, dtype), query_be, 4 * K)
        cells = [recall(wide_bl[:, :K], exact_bk)]
        for searched in (K + K // 2, 2 * K, 4 * K):
            found_bl = wide_bl[:, :searched]
            scores_bl = np.einsum("be,ble->bl", query_be, rows_ne[found_bl])
            best_bk = np.argsort(-scores_bl, axis=1)[:, :K]
            cells.append(recall(np.take_along_axis(found_bl, best_bk, axis=1), exact_bk))
        print(f"| {name} | {dtype} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |")


def recall(found_bk: np.ndarray, exact_bk: np.ndarray) -> float:
    """The share of the exact rows that were found."""
    pairs = zip(found_bk.tolist(), exact_bk.tolist(), strict=True)
    return float(np.mean([len(set(found) & set(exact)) / len(exact) for found, exact in pairs]))


def _search(rows: Any, query_be: np.ndarray, k: int) -> np.ndarray:
    none_n1 = np.zeros((rows.shape[0], 1), np.uint16)
    index = DeviceIndex(
        embeddings_ne=jax.tree.map(jax.numpy.asarray, rows),
        reader_tokens_nl=none_n1,
        retriever_tokens_nm=none_n1,
        count=np.int32(rows.shape[0]),
        version=np.int32(0),
    )
    search = jax.jit(exact_search, static_argnames="k")
    parts = np.split(query_be, range(50, len(query_be), 50))
    return np.concatenate([np.asarray(search(index, part, k).rows_bk) for part in parts])


def _random(rows: int, queries: int, width: int = 768) -> tuple[np.ndarray, np.ndarray]:
    """Rows and queries around common centres, a hundred rows to each."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(1, rows // 100), width), np.float32)

    def around(count: int) -> np.ndarray:
        chosen = rng.integers(0, len(centres), count)
        return centres[chosen] + rng.standard_normal((count, width), np.float32)

    return around(rows), around(queries)


if __name__ == "__main__":
    raise SystemExit(main())
