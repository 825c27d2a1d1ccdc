"""From a corpus of tokens to its embeddings, without wasting time on padding.

The rows of a batch are divided into parts, one for each group of devices that embeds rows of its
own. Each part works through chunks of the corpus: part p of P takes the chunks p, p + P, ... So a
host feeds the chunks of its own devices, and writes them. What is computed depends on the number of
parts, not on the number of hosts.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from atlas_jax.core.arrays import first_not_finite
from atlas_jax.core.errors import UserError
from atlas_jax.core.progress import show_progress
from atlas_jax.core.types import PAD_ID, Array
from atlas_jax.core.widths import power_of_two
from atlas_jax.index.arrays import Rows

LENGTH_STEP = 8  # lengths are rounded up to a multiple of it: few programs, little padding
FEW = 256  # so many rows: to compile a program costs more than to compute padding
WINDOW = 1 << 16  # rows of a chunk, which are sorted by length together, at most

EmbedFn = Callable[[np.ndarray], Array]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a batch.

    Attributes:
      count: of all processes.
      fed: those whose tokens this process gives, ascending.
      kept: those whose embeddings it gets, ascending.
    """

    count: int = 1
    fed: tuple[int, ...] = (0,)
    kept: tuple[int, ...] = (0,)


def chunk_rows(count: int, parts: int) -> int:
    """Rows of a chunk: at most ``WINDOW``, and so many that all parts have like work."""
    rounds = -(-count // (parts * WINDOW))
    return -(-count // (parts * rounds))


def embed_corpus(
    embed_fn: EmbedFn,
    retriever_tokens_nm: Any,
    batch_size: int = 64,
    out: Any = None,
    progress: bool = True,
    done: Collection[int] = (),
    at_a_time: int = 1,
    parts: Parts = Parts(),
    to_host: Callable[[Any], np.ndarray] = np.asarray,
) -> Any:
    """Embed every passage, batching passages of like length.

    Attention costs grow with the padded length, so rows are sorted by their real length
    and cut to it, rounded up to a multiple of ``LENGTH_STEP``. Of at most ``FEW`` rows the lengths
    are doublings of it, so that changes of an index soon find all their programs compiled. Every
    batch has ``batch_size`` rows; an incomplete one repeats a row.

    Args:
      embed_fn: jitted; int32 tokens of the fed parts [b, length] to embeddings of the kept parts
        [b, e]. Compiles once per length, at most m / LENGTH_STEP times.
      retriever_tokens_nm: tokens [n, m], padded with 0, an array or ``Rows`` (read a chunk at a
        time).
      batch_size: of all parts.
      out: array [n, e] or ``NewRows`` to write to; without it a new float32 array.
      progress: show it.
      done: chunks of ``chunk_rows`` that ``out`` has already.
      at_a_time: batches that are embedded side by side, each from a thread of its own.
      parts: of a batch, and which of them are this process's.
      to_host: gives what ``embed_fn`` returns as one array.

    Returns:
      ``out`` [n, e], in the order of the rows; rows of parts that are not kept are not written.

    Raises:
      ValueError: there are no passages, or ``out`` has the wrong shape.
      UserError: an embedding is not finite; names the row. Where several processes take part, all
        others are computed first, since no process may leave them waiting.
    """
    n, faults = len(retriever_tokens_nm), list[Exception]()
    for rows_b, embedded in embedded_batches(
        embed_fn, retriever_tokens_nm, batch_size, progress, at_a_time, "embed", parts, done
    ):
        if out is None:
            out = np.empty((n, embedded.shape[1]), np.float32)
        if out.shape != (n, embedded.shape[1]):
            raise ValueError(f"out is {out.shape}, embeddings {(n, embedded.shape[1])}")
        if faults:
            continue
        try:
            is_real = rows_b >= 0
            fresh, rows = to_host(embedded)[is_real], rows_b[is_real]
            at = first_not_finite(fresh)
            if at is not None:
                raise UserError(
                    f"the retriever gives passage {rows[at // fresh.shape[1]]} (counted from 0) an "
                    "embedding that is not finite; it would be found first for every question"
                )
            if len(rows):
                out[rows] = fresh
        except (UserError, OSError) as error:
            if parts.count == len(parts.fed):
                raise
            faults.append(error)
    if faults:
        raise faults[0]
    return out


def embedded_batches(
    embed_fn: EmbedFn,
    retriever_tokens_nm: Any,
    batch_size: int,
    progress: bool = True,
    at_a_time: int = 1,
    title: str = "embed",
    parts: Parts = Parts(),
    done: Collection[int] = (),
) -> Iterator[tuple[Int[np.ndarray, " b"], Float[Array, "b e"]]]:
    """Yield the batches of ``embed_corpus``: the rows of the kept parts, and their embeddings.

    A row of -1 stands for a repeated row, which fills a batch. ``title`` names the progress bar.
    ``embed_fn`` may give states instead of embeddings. While the caller works on one batch, the
    devices work on the next ``at_a_time`` batches.

    Each batch is finished before the caller gets it. This keeps several processes in step, also
    those that throw the embeddings away. JAX would wait for ever if one of several processes with
    several devices each were about 32 programs ahead of the others.
    """
    n = len(retriever_tokens_nm)
    if n == 0:
        raise ValueError("there are no passages to embed")
    chunk = chunk_rows(n, parts.count)
    rounds = [
        first
        for first in range(0, -(-n // chunk), parts.count)
        if not set(range(first, min(first + parts.count, -(-n // chunk)))) <= set(done)
    ]
    left = sum(max(0, min(n - at * chunk, parts.count * chunk)) for at in rounds)
    with (
        show_progress(title, total=n, initial=n - left, shown=progress) as bar,
        _begun(embed_fn, at_a_time) as begin,
    ):
        pending: collections.deque[tuple[np.ndarray, int, Callable[[], Array]]]
        pending = collections.deque()

        def oldest() -> tuple[np.ndarray, Array]:
            rows_b, real, embedded = pending.popleft()
            made = jax.block_until_ready(embedded())
            bar.update(real)
            return rows_b, made

        for first in rounds:
            chunks = [
                (min(at * chunk, n), min((at + 1) * chunk, n))
                for at in range(first, first + parts.count)
            ]
            for rows_b, real, tokens in _batches(retriever_tokens_nm, chunks, parts, batch_size):
                pending.append((rows_b, real, begin(tokens)))
                if len(pending) > at_a_time:
                    yield oldest()
        while pending:
            yield oldest()


@contextlib.contextmanager
def _begun(
    embed_fn: EmbedFn, at_a_time: int
) -> Iterator[Callable[[np.ndarray], Callable[[], Array]]]:
    """A function that starts to embed a batch. Call its result to get the embeddings.

    The batch is embedded in the background: by the devices where one batch is embedded at a
    time, else by one of ``at_a_time`` threads.
    """
    if at_a_time == 1:  # JAX returns before the devices are done

        def begin(tokens: np.ndarray) -> Callable[[], Array]:
            embedded = embed_fn(tokens)
            return lambda: embedded

        yield begin
        return
    with ThreadPoolExecutor(at_a_time) as threads:  # each length compiles once, in one thread
        yield lambda tokens: threads.submit(lambda: np.asarray(embed_fn(tokens))).result


def _batches(
    tokens_nm: Any, chunks: list[tuple[int, int]], parts: Parts, batch_size: int
) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
    """Of each batch: kept rows, number of rows of all parts, and int32 tokens of the fed parts.

    The longest come first: what is too big for the device's memory shows at once.

    Args:
      chunks: first row of each part's chunk, and the row behind its last.
    """
    read = {part: np.asarray(tokens_nm[slice(*chunks[part])]) for part in parts.fed}
    lengths = [lengths_of(tokens_nm, *chunk, read.get(part)) for part, chunk in enumerate(chunks)]
    orders = [np.argsort(-one, kind="stable") for one in lengths]
    m, size = tokens_nm.shape[1], batch_size // parts.count
    few = len(tokens_nm) <= FEW
    for start in range(0, max(map(len, orders)), size):
        taken = [order[start : start + size] for order in orders]
        longest = max(int(one[own[0]]) for one, own in zip(lengths, taken, strict=True) if len(own))
        steps = -(-longest // LENGTH_STEP)
        length = min(m, LENGTH_STEP * (power_of_two(steps) if few else steps))
        rows_b = np.full((len(parts.kept), size), -1, np.int64)
        for at, part in enumerate(parts.kept):
            rows_b[at, : len(taken[part])] = taken[part] + chunks[part][0]
        fed = []
        for part in parts.fed:
            own, there = taken[part], read[part]
            if not len(own) and not len(there):
                there = np.asarray(tokens_nm[:1])
            own = own if len(own) else np.zeros(1, np.int64)
            filled = np.pad(own, (0, size - len(own)), mode="edge")
            fed.append(there[filled, :length].astype(np.int32))
        yield rows_b.reshape(-1), sum(map(len, taken)), np.concatenate(fed)


def lengths_of(
    tokens_nm: Any, start: int, stop: int, read: np.ndarray | None = None
) -> Int[np.ndarray, " r"]:
    """Tokens of some rows up to their padding, at least 1.

    Args:
      read: these rows, where they are in memory.
    """
    told = tokens_nm.lengths(start, stop) if isinstance(tokens_nm, Rows) else None
    if told is not None:  # all processes must find the same
        return np.maximum(told, 1)
    rows = np.asarray(tokens_nm[start:stop]) if read is None else read
    m = rows.shape[1]
    # Counted from the right, so that a stray 0 inside a text cuts nothing off.
    lengths_r = m - np.argmax(rows[:, ::-1] != PAD_ID, axis=1)
    return np.where((rows == PAD_ID).all(axis=1), 1, lengths_r)


def longest_of(tokens_nm: Any) -> int:
    """Tokens of the longest row up to its padding, at least 1; what is longer is all padding."""
    n = len(tokens_nm)
    starts = range(0, n, WINDOW)
    return max(int(lengths_of(tokens_nm, at, min(at + WINDOW, n)).max()) for at in starts)
