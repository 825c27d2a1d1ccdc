"""The ids of a store's passages, sorted by hash: equal ones are found, and each is found again.

The hashes are divided by their first bits among rounds, and the rounds among processes. So no
process has all ids in memory.
"""

from collections.abc import Callable, Sequence

import numpy as np

from atlas_jax.core.objects import Objects, finish
from atlas_jax.core.unique import repeated
from atlas_jax.index.arrays import begin_zarr
from atlas_jax.index.shard_writer import PREFIXES, ShardNote, read_ids
from atlas_jax.index.shards import bucket_bits, ids_name

BUCKET_ROWS = 1 << 16
_AT_ONCE = 6  # bits: a round has 64 arrays of ids, about four million
_MOST_BUCKETS = 16  # bits


def buckets_of(count: int) -> int:
    """How many arrays of ids a store of so many passages has."""
    return 1 << min(bucket_bits(count, BUCKET_ROWS), _MOST_BUCKETS)


def rounds_of(count: int) -> int:
    """How many rounds are needed to write all of them."""
    return min(max(1, buckets_of(count) >> _AT_ONCE), PREFIXES)


def make_round(
    objects: Objects, notes: Sequence[ShardNote], number: int, id_of: Callable[[int], str]
) -> tuple[int, int] | None:
    """Write the arrays of ids of one round.

    Args:
      notes: of all shards that have rows, in order.
      number: of the round.
      id_of: the id of a row of the store, asked only where two hashes are equal.

    Returns:
      The first row whose id an earlier row has, and the first row of this id; None if all differ.

    Raises:
      OSError: they cannot be written.
    """
    starts = np.cumsum([0, *(note["rows"] for note in notes)])
    count = int(starts[-1])
    rounds, buckets = rounds_of(count), buckets_of(count)
    share = PREFIXES // rounds
    found = read_ids(objects, notes, number * share, (number + 1) * share)
    hashes = np.concatenate([one for one, _ in found]).astype(np.uint64)
    rows = np.concatenate(
        [
            own.astype(np.uint64) + np.uint64(start)
            for (_, own), start in zip(found, starts, strict=False)
        ]
    )
    order = np.lexsort((rows, hashes))
    hashes, rows = hashes[order], rows[order]
    bits = buckets.bit_length() - 1
    per_round = buckets // rounds
    first = np.arange(number * per_round, (number + 1) * per_round, dtype=np.uint64)
    cuts = np.searchsorted(hashes, first << np.uint64(64 - bits)) if bits else np.zeros(1, int)
    ends = [*cuts.tolist()[1:], len(hashes)]
    pairs = np.stack([hashes, rows], axis=1)
    finish(
        one
        for bucket, start, end in zip(first.tolist(), cuts.tolist(), ends, strict=True)
        for one in begin_zarr(objects, ids_name(bucket), pairs[start:end], max(1, end - start))
    )
    same = np.flatnonzero(hashes[1:] == hashes[:-1])
    if not len(same):
        return None
    of_equal = np.union1d(same, same + 1)
    of_equal = of_equal[np.argsort(rows[of_equal], kind="stable")]
    own = rows[of_equal].astype(np.int64)
    # The ids may all be equal, and each is read on its own: the first is enough.
    twice = next(repeated(hashes[of_equal], lambda at: id_of(int(own[at]))), None)
    return None if twice is None else (int(own[twice[0]]), int(own[twice[1]]))
