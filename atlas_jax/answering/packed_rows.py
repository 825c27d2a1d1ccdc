"""How many rows the passages of a question get when several share a row (`core.packing`)."""

import sys
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from atlas_jax.answering.batcher import DataConfig
from atlas_jax.answering.truncation import evenly
from atlas_jax.core import multihost
from atlas_jax.core.errors import UserError
from atlas_jax.core.packing import rows_needed
from atlas_jax.corpus.config import FROM_LENGTHS, ReadConfig
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.assembly import Tokenizers
from atlas_jax.models.parameters import Models
from atlas_jax.tasks.base import Example

MEASURED = 512  # questions whose lengths are taken, at most
_PASSAGES = 8_192  # whose lengths are taken, at most
_GROUP = 128  # of them lie side by side
_DRAWN = 4096  # questions, each with its passages
_WORTH = 0.8  # of the padded rows; packing is left out where it saves less

# Tokens of questions, and of passages without their question.
Lengths = tuple[np.ndarray, np.ndarray]


def packed_rows(
    told: ReadConfig, models: Models, k: int, batch: int, lengths_of: Callable[[], Lengths | None]
) -> int:
    """Rows that the k passages of a question share; 0 = each passage has a row of its own.

    If ReadConfig.packed_rows is to follow from the lengths, 4,096 questions are drawn, each with k
    of the passages. They tell how probable it is that all questions of a batch fit into a number of
    rows. The number is taken with which the fewest rows are read on average; a batch that does not
    fit reads k. The result is told.

    Args:
      k: passages that are read. A number that was told is of ReadConfig.k passages, and other k
        get their share of it.
      batch: questions that are read at a time.
      lengths_of: called where the lengths decide; None = they are not known.

    Raises:
      UserError: a pair encoder, or a reader with experts, shall read several passages a row.
    """
    rows, config = told.packed_rows, models.reader.config
    if rows > 0 and config.num_experts:
        raise UserError(
            f"StepConfig.packed_rows = {rows}: passages that share a row would compete for the "
            f"places of ReaderConfig.num_experts = {config.num_experts} experts; bind it to 0"
        )
    if rows > 0 and config.encoder == "pair":
        raise UserError(
            f"StepConfig.packed_rows = {rows}: a reader with ReaderConfig.encoder = 'pair' reads "
            f"one passage a row; bind it to 0, or to {FROM_LENGTHS}, which means 0 there"
        )
    if rows > 0:
        return told.packed_share(rows, k)
    if rows == 0 or k == 1 or config.encoder == "pair" or config.num_experts:
        return 0
    lengths = lengths_of()
    if lengths is None:
        return 0
    questions_n, passages_n = lengths
    rng, prompt = np.random.default_rng(0), _prompt(models)
    chosen_bk = rng.choice(passages_n, (_DRAWN, k)) + rng.choice(questions_n, (_DRAWN, 1))
    tokens_bk = np.minimum(chosen_bk + 1, told.reader_length) + prompt  # 1 for the end token
    return _fewest(tokens_bk, told.reader_length + prompt, batch, "", "packed_rows")


def packed_passages(
    told: ReadConfig,
    passages: int,
    batch: int,
    length: int,
    lengths_of: Callable[[], np.ndarray | None],
) -> int:
    """Rows that some passages of a question share in the passage tower; 0 = they share none.

    As `packed_rows`, by the lengths of passages alone.

    Args:
      passages: of a question. A number that was told is of ReadConfig.k passages, and others get
        their share of it.
      batch: questions whose passages are embedded at a time.
      length: tokens of a row.
      lengths_of: called where the lengths decide; None = they are not known.
    """
    if told.packed_passages > 0:
        return told.packed_share(told.packed_passages, passages)
    if told.packed_passages == 0 or told.packed_rows == 0 or passages == 1:
        return 0
    lengths_n = lengths_of()
    if lengths_n is None:
        return 0
    tokens_bk = np.random.default_rng(0).choice(lengths_n, (_DRAWN, passages))
    return _fewest(tokens_bk, length, batch, "for the retriever ", "packed_passages")


def _fewest(tokens_bk: np.ndarray, length: int, batch: int, who: str, binding: str) -> int:
    """The rows with which the fewest are read on average, told; 0 = no sharing pays."""
    k = tokens_bk.shape[1]
    needed_b = jax.jit(rows_needed, static_argnums=1)(tokens_bk.astype(np.int32), length)
    numbers = np.arange(1, k + 1)
    fits = np.mean(np.asarray(needed_b)[:, None] <= numbers, axis=0) ** batch
    read = fits * numbers + (1 - fits) * k
    rows = int(numbers[read.argmin()])
    packs = read.min() <= _WORTH * k
    if multihost.is_first():
        print(
            f"{k} passages a question, {tokens_bk.mean():.0f} of {length} tokens each {who}on "
            "average: "
            + (f"they share {rows} rows" if packs else "each has a row of its own")
            + f" (StepConfig.{binding})",
            file=sys.stderr,
        )
    return rows if packs else 0


def _prompt(models: Models) -> int:
    """Tokens of the reader's soft prompt."""
    prompts = (config for path, config in models.deltas if path == "reader")
    return sum(config.length for config in prompts if config.kind == "prompt")


def store_lengths(store: PassageStore, tower: str = "reader") -> np.ndarray:
    """Reader (or retriever) tokens of some passages, in groups that are spread over the store.

    Groups, since a store may lie in a bucket, where each place that is read costs a request.
    """
    every = store.reader_tokens_nl if tower == "reader" else store.retriever_tokens_nm
    groups = evenly(-(-store.count // _GROUP), _PASSAGES // _GROUP)
    read = [every[at * _GROUP : min((at + 1) * _GROUP, store.count)] for at in groups]
    return np.count_nonzero(np.concatenate(read), axis=1)


def passage_lengths(
    examples: Iterable[Example],
    tokenizers: Tokenizers,
    formats: StoreConfig,
    store: PassageStore | None,
) -> np.ndarray | None:
    """Retriever tokens of the passages that some examples may read, with their special tokens.

    Args:
      store: the passages that are searched; None = those that the examples bring.

    Returns:
      None if there are no passages.
    """
    if store is not None:
        return store_lengths(store, "retriever")
    given = [passage for example in examples for passage in example.given_passages or ()]
    texts = [formats.text("retriever", passage) for passage in given[:_PASSAGES]]
    encoded = tokenizers.retriever.encode_batch(texts, add_special=True) if texts else []
    return np.array([min(len(ids), formats.retriever_length) for ids in encoded]) if texts else None


def lengths_of(
    examples: Iterable[Example],
    tokenizers: Tokenizers,
    data: DataConfig,
    formats: StoreConfig,
    store: PassageStore | None,
) -> Lengths | None:
    """Lengths of some examples' questions, and of the passages that they may read.

    Args:
      store: the passages that are searched; None = those that the examples bring.

    Returns:
      None if there are no passages.
    """
    tokenizer = tokenizers.reader
    every = list(examples)
    some = [every[i] for i in evenly(len(every), MEASURED)]

    def tokens(texts: Sequence[str], most: int) -> np.ndarray:
        encoded = tokenizer.encode_batch(texts, add_special=False)
        return np.array([min(len(ids), most) for ids in encoded])

    questions_n = tokens([example.query_text for example in some], data.query_length)
    if store is not None:
        return questions_n, store_lengths(store)
    given = [passage for example in some for passage in example.given_passages or ()]
    texts = [formats.text("reader", passage) for passage in given[:_PASSAGES]]
    return (questions_n, tokens(texts, formats.reader_length)) if texts else None
