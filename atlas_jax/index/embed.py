"""From a corpus of tokens to its embeddings, without wasting time on padding."""

import collections
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Integer

from atlas_jax.core.arrays import first_not_finite
from atlas_jax.core.errors import UserError
from atlas_jax.core.progress import show_progress
from atlas_jax.core.types import PAD_ID, Array

LENGTH_STEP = 8  # lengths are rounded up to a multiple of it: few programs, little padding
WINDOW = 1 << 16  # rows sorted by length together, so that reading stays nearly sequential

EmbedFn = Callable[[np.ndarray], Array]


def embed_corpus(
    embed_fn: EmbedFn,
    retriever_tokens_nm: Integer[np.ndarray, "n m"],
    batch_size: int = 64,
    out: Any = None,
    progress: bool = True,
    first: int = 0,
    stored: Callable[[int], None] = lambda rows: None,
    at_a_time: int = 1,
) -> Any:
    """Embed every passage, batching passages of like length.

    Attention costs grow with the padded length, so rows are sorted by their real length
    and cut to it, rounded up to a multiple of ``LENGTH_STEP``. Every batch has
    ``batch_size`` rows; an incomplete one repeats its last row.

    Args:
      embed_fn: jitted; int32 tokens [batch_size, length] to embeddings [batch_size, e].
        Compiles once per length, at most m / LENGTH_STEP times.
      retriever_tokens_nm: tokens padded with 0, an array or a memory map (streamed).
      out: array [n, e] or ``Int8Rows`` to write to, such as the memory map of
        ``saved.new_index``; without it a new float32 array.
      progress: show it.
      first: rows that ``out`` has already, a multiple of ``WINDOW`` or all of them.
      stored: called after each window with the number of rows that ``out`` has by then.
      at_a_time: batches that are embedded side by side, each from a thread of its own.

    Returns:
      ``out`` [n, e], in the order of the rows.

    Raises:
      ValueError: there are no passages, or ``out`` has the wrong shape.
      UserError: an embedding is not finite; names the row.
    """
    n, begun = len(retriever_tokens_nm), first
    for rows, embedded in embedded_batches(
        embed_fn, retriever_tokens_nm, batch_size, progress, first, at_a_time
    ):
        if out is None:
            out = np.empty((n, embedded.shape[1]), np.float32)
        if out.shape != (n, embedded.shape[1]):
            raise ValueError(f"out is {out.shape}, embeddings {(n, embedded.shape[1])}")
        window = int(rows[0]) // WINDOW * WINDOW
        if window > begun:
            stored(window)
            begun = window
        fresh = np.asarray(embedded)[: len(rows)]
        at = first_not_finite(fresh)
        if at is not None:
            raise UserError(
                f"the retriever gives passage {rows[at // fresh.shape[1]]} (counted from 0) an "
                "embedding that is not finite; it would be found first for every question"
            )
        out[rows] = fresh
    assert out is not None
    stored(n)
    return out


def embedded_batches(
    embed_fn: EmbedFn,
    retriever_tokens_nm: Integer[np.ndarray, "n m"],
    batch_size: int,
    progress: bool = True,
    first: int = 0,
    at_a_time: int = 1,
    title: str = "embed",
) -> Iterator[tuple[Int[np.ndarray, " r"], Float[Array, "b e"]]]:
    """Yield the batches of ``embed_corpus``: their rows, and the embeddings of these rows.

    ``title`` names the progress bar. ``embed_fn`` may give states instead of embeddings.
    The last batch may be filled up with copies of its last row; their embeddings come last.
    While the caller works on one batch, the devices work on the next ``at_a_time`` batches.

    Each batch is finished before the caller gets it. This keeps several processes in step, also
    those that throw the embeddings away. JAX would wait for ever if one of several processes with
    several devices each were about 32 programs ahead of the others.
    """
    n = len(retriever_tokens_nm)
    if n == 0:
        raise ValueError("there are no passages to embed")
    with (
        show_progress(title, total=n, initial=first, shown=progress) as bar,
        _begun(embed_fn, at_a_time) as begin,
    ):
        pending: collections.deque[tuple[np.ndarray, Callable[[], Array]]] = collections.deque()

        def oldest() -> tuple[np.ndarray, Array]:
            rows, embedded = pending.popleft()
            return rows, jax.block_until_ready(embedded())

        for start in range(first, n, WINDOW):
            window = np.asarray(retriever_tokens_nm[start : start + WINDOW])
            for rows, tokens in _batches(window, batch_size):
                pending.append((start + rows, begin(tokens)))
                if len(pending) > at_a_time:
                    yield (done := oldest())
                    bar.update(len(done[0]))
        while pending:
            yield (done := oldest())
            bar.update(len(done[0]))


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


def _batches(tokens_nm: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows and int32 tokens of each batch.

    The longest come first: what is too big for the device's memory shows at once.
    """
    n, m = tokens_nm.shape
    # Counted from the right, so that a stray 0 inside a text cuts nothing off.
    lengths_n = m - np.argmax(tokens_nm[:, ::-1] != PAD_ID, axis=1)
    lengths_n = np.where((tokens_nm == PAD_ID).all(axis=1), 1, lengths_n)
    order = np.argsort(-lengths_n, kind="stable")
    for start in range(0, n, batch_size):
        rows = order[start : start + batch_size]
        longest = int(lengths_n[rows[0]])
        length = min(m, -(-longest // LENGTH_STEP) * LENGTH_STEP)
        filled = np.pad(rows, (0, batch_size - len(rows)), mode="edge")
        yield rows, tokens_nm[filled, :length].astype(np.int32)
