"""Equal ids among many: each id is kept as 64 bits, and only what has equal bits is compared."""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np


def hash_id(passage_id: str) -> int:
    """64 bits of an id."""
    return int.from_bytes(hashlib.blake2b(passage_id.encode("utf-8"), digest_size=8).digest())


def repeated(hashes_n: np.ndarray, id_of: Callable[[int], str]) -> Iterator[tuple[int, int]]:
    """Rows whose id an earlier row has, each as (row, first row with this id), ascending.

    Args:
      hashes_n: uint64, `hash_id` of each row's id.
      id_of: row -> its id; asked only where two hashes are equal.
    """
    rows_n = np.argsort(hashes_n, kind="stable")
    sorted_n = hashes_n[rows_n]
    equal = sorted_n[1:] == sorted_n[:-1]
    first: dict[str, int] = {}
    for row in np.union1d(rows_n[1:][equal], rows_n[:-1][equal]).tolist():
        passage_id = id_of(row)
        if passage_id in first:
            yield row, first[passage_id]
        first.setdefault(passage_id, row)
