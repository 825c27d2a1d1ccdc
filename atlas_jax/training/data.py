"""From records to token batches of one static shape, in an order that can be resumed."""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.types import Batch
from atlas_jax.tasks.base import Example, Task
from atlas_jax.tasks.file_records import fetch

_PREFETCH = 4  # batches that one thread makes ahead of the step


def training_batches(
    task: Task,
    records: Sequence[Any],
    batcher: Callable[[Sequence[Example]], Batch],
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> Any:
    """Endless training batches; the records are shuffled anew in each epoch.

    An example depends only on the seed and its place in the endless stream. So a stream that
    continues from a saved state gives the same examples as one that was never interrupted. Several
    processes that share a stream give the same examples as one process.

    Args:
      task: makes the examples; it is given the training step that they are for.
      records: what `task.load` returned.
      batcher: makes a batch of this process's examples.
      batch_size: examples of a step over all processes.
      seed: decides order and masking; from 0 to 2**32 - 1.
      rows: rows of each batch that this process makes, `multihost.local_rows`; None = all.

    Returns:
      A grain iterator of `Batch` (numpy) with `get_state()` and `set_state(state)`; the
      state is a small dict of JSON values.

    Raises:
      UserError: the seed is out of range.
    """
    if not 0 <= seed < 1 << 32:
        raise UserError(f"the seed is {seed}, but must be from 0 to 2**32 - 1")

    mine = range(batch_size) if rows is None else rows

    def make_batch(step: int, numbers: Sequence[int]) -> Batch:
        examples = []
        own = fetch(records, [int(numbers[row]) for row in mine])
        for row, record in zip(mine, own, strict=True):
            rng = np.random.Generator(np.random.Philox(key=[seed, step * batch_size + row]))
            examples.append(task.example(record, rng, step=step))
        return batcher(examples)

    stream = grain.MapDataset.range(len(records)).seed(seed).shuffle().repeat()
    # Only this process's records are read, if they lie in a file, and become examples and tokens.
    batches = stream.batch(batch_size, drop_remainder=True, batch_fn=list).map_with_index(
        make_batch
    )
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)
    return iter(batches.to_iter_dataset(options))
