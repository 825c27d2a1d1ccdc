"""The sizes of the workloads, the work in each, and the random inputs that both sides read."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Ways = dict[str, Callable[[], object]]  # ways to do the same work, by name; the fastest counts


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One reader, one retriever, one search problem; the defaults are the published ones."""

    reader_width: int = 512
    reader_layers: int = 6
    reader_mlp: int = 1024
    reader_heads: int = 8
    reader_vocab: int = 32_000
    retriever_width: int = 384
    retriever_layers: int = 6
    retriever_mlp: int = 1536
    retriever_heads: int = 12
    retriever_vocab: int = 30_522
    batch: int = 2
    passages: int = 8
    length: int = 128
    target: int = 16
    query_length: int = 32
    embed_passages: int = 2_000
    embed_batch: int = 16  # the fastest of 16, 32 and 64 on either side
    index_rows: int = 200_000
    search_queries: int = 64
    squad: str = ""  # folder of SQuAD's passages and questions
    limit: int = 384  # tokens of a real text at most, with its question
    real_batch: int = 1  # questions whose passages are read at a time, where texts are real
    real_passages: int = 20  # of each


def sizes_of(changes: Sequence[str]) -> Sizes:
    """The published sizes with changes such as "index_rows=500"."""
    told = dict(change.split("=", 1) for change in changes)
    return Sizes(**{name: x if name == "squad" else int(x) for name, x in told.items()})  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class ReaderInputs:
    """Token ids of one training batch; nothing is padded, so both sides do the same work."""

    tokens_bkl: np.ndarray
    targets_bt: np.ndarray
    query_br: np.ndarray
    passages_bkm: np.ndarray


def reader_inputs(sizes: Sizes, seed: int = 0) -> ReaderInputs:
    """Random tokens for the train step and for generation."""
    rng = np.random.default_rng(seed)

    def ids(high: int, *shape: int) -> np.ndarray:
        return rng.integers(3, high, shape, dtype=np.int64)

    b, k = sizes.batch, sizes.passages
    return ReaderInputs(
        tokens_bkl=ids(sizes.reader_vocab, b, k, sizes.length),
        targets_bt=ids(sizes.reader_vocab, b, sizes.target),
        query_br=ids(sizes.retriever_vocab, b, sizes.query_length),
        passages_bkm=ids(sizes.retriever_vocab, b, k, sizes.length),
    )


def passages_of_real_lengths(sizes: Sizes, seed: int = 0) -> np.ndarray:
    """Padded passage tokens [n, 128], 20 to 128 real tokens each, most near the long end."""
    rng = np.random.default_rng(seed)
    lengths = 20 + np.round(108 * rng.beta(4, 2, sizes.embed_passages)).astype(int)
    tokens = rng.integers(3, sizes.retriever_vocab, (sizes.embed_passages, 128), dtype=np.int64)
    return np.where(np.arange(128) < lengths[:, None], tokens, 0)


def lengths_of_paragraphs(sizes: Sizes, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Tokens of a paragraph with its question: 150 on average, deviation 60, up to the limit."""
    rng = np.random.default_rng(seed)
    shortest = sizes.query_length + 2
    return np.clip(rng.gamma(6, 25, shape).astype(int), shortest, sizes.length)


def search_arrays(sizes: Sizes, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings [n, e], queries [b, e]) in float32."""
    rng = np.random.default_rng(seed)
    embeddings = rng.standard_normal((sizes.index_rows, sizes.retriever_width), np.float32)
    queries = rng.standard_normal((sizes.search_queries, sizes.retriever_width), np.float32)
    return embeddings, queries


def gflop(workload: str, sizes: Sizes) -> float:
    """The work of one round in 10^9 operations: two for each multiplication in a matrix product.

    The work that has to be done is counted, for both sides alike: real tokens and no padding, one
    forward pass and twice as much for a backward pass.
    """
    if workload.startswith("search_"):
        return 2e-9 * sizes.search_queries * sizes.index_rows * sizes.retriever_width
    if workload == "embed":
        return bert_gflop(sizes, (passages_of_real_lengths(sizes) > 0).sum(axis=1))
    b, k, length = sizes.batch, sizes.passages, sizes.length
    passages_bk, questions_b = np.full((b, k), length), np.full(b, sizes.query_length)
    return read_gflop(workload, sizes, passages_bk, passages_bk, questions_b)


def read_gflop(
    workload: str,
    sizes: Sizes,
    inputs_bk: np.ndarray,
    passages_bk: np.ndarray,
    questions_b: np.ndarray,
) -> float:
    """The work of a batch that is read, from the tokens of its inputs, passages and questions."""
    inputs_bk = inputs_bk.astype(np.float64)
    encoder = float(sum(_t5_encoder(sizes, n) for n in inputs_bk.reshape(-1)))
    fused = float(sum(_t5_decoder(sizes, sizes.target, n) for n in inputs_bk.sum(axis=1)))
    if workload == "generate":
        return encoder + fused
    # Forward only: the distilled target.
    alone = float(sum(_t5_decoder(sizes, sizes.target, n) for n in inputs_bk.reshape(-1)))
    towers = bert_gflop(sizes, passages_bk.reshape(-1)) + bert_gflop(sizes, questions_b)
    return 3 * (encoder + fused + towers) + alone


def bert_gflop(sizes: Sizes, lengths: np.ndarray) -> float:
    """The work of embedding texts of these lengths."""
    d, mlp, tokens = sizes.retriever_width, sizes.retriever_mlp, float(lengths.sum())
    products = tokens * (4 * d * d + 2 * d * mlp)
    attention = 2.0 * d * float((lengths.astype(np.float64) ** 2).sum())
    return 2e-9 * sizes.retriever_layers * (products + attention)


def _t5_encoder(sizes: Sizes, length: float) -> float:
    d, mlp = sizes.reader_width, sizes.reader_mlp
    return 2e-9 * sizes.reader_layers * length * (4 * d * d + 3 * d * mlp + 2 * d * length)


def _t5_decoder(sizes: Sizes, target: int, source: float) -> float:
    d, mlp = sizes.reader_width, sizes.reader_mlp
    token = 6 * d * d + 3 * d * mlp + 2 * d * (target + source)
    layers = sizes.reader_layers * (target * token + 2 * source * d * d)
    return 2e-9 * (layers + target * d * sizes.reader_vocab)
