"""The files of a passage store in shards: what a shard holds, and how its rows are read.

    shards/NAME/text.jsonl    one {id, title, section, text} a line
    shards/NAME/offsets       uint64 [3, r + 1]: where each of the r rows begins in the text and in
                              the tokens of reader and retriever; at last, where they end
    shards/NAME/reader        uint16 or int32: the rows' tokens, one row behind the other
    shards/NAME/retriever     as well
    ids/00000, ...            uint64 [m, 2]: hash of an id and its row in the store, ascending; the
                              first bits of the hash tell which of the 2 ** k arrays has it

All but the text are zarr arrays (see `arrays.py`).
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from atlas_jax.core.errors import UserError, advised
from atlas_jax.core.objects import Objects
from atlas_jax.core.parts import PARTS
from atlas_jax.index.arrays import Finish, JoinedRows, Rows, ZarrRows

TEXT, OFFSETS = "text.jsonl", "offsets"
_ANEW = "a file of this store is missing or damaged: remove the store and build it anew"
_STREAMS = ("text", *PARTS)  # the rows of `offsets`
_KEPT_OPEN = 1024  # shards whose offsets stay in memory
_IDS_OPEN = 64  # of the arrays of ids


def shard_folder(name: str) -> str:
    """Where a shard lies in its store."""
    return f"shards/{name}"


def ids_name(bucket: int) -> str:
    """Where an array of ids lies in its store."""
    return f"ids/{bucket:05d}"


def bucket_bits(count: int, rows: int) -> int:
    """The smallest k for which each of 2 ** k arrays of ids has at most ``rows`` rows."""
    return max(0, (count - 1) // rows).bit_length()


class ShardedFiles:
    """The text, tokens and ids of a store in shards."""

    def __init__(
        self,
        objects: Objects,
        shards: Sequence[tuple[str, int]],
        buckets: int,
        widths: Mapping[str, tuple[int, str]],
    ) -> None:
        """Read nothing yet.

        Args:
          shards: name and number of rows of each, in the order of the rows.
          buckets: number of arrays of ids.
          widths: for each tower the number of tokens that are kept of a passage, and their type.
        """
        self.objects, self.names = objects, [name for name, _ in shards]
        self.counts = [count for _, count in shards]
        self.starts = np.cumsum([0, *self.counts])
        self._buckets, self._widths = buckets, widths
        self._offsets_of = functools.lru_cache(_KEPT_OPEN)(advised(self._read_offsets, _ANEW))
        self._ids_of = functools.lru_cache(_IDS_OPEN)(advised(self._read_ids, _ANEW))
        self._values_of = functools.lru_cache(_KEPT_OPEN * len(PARTS))(
            advised(self._open_values, _ANEW)
        )

    def tokens(self, tower: str) -> Rows:
        """The tokens of all rows [n, length], padded with 0."""
        width, dtype = self._widths[tower]
        return JoinedRows(
            [
                ShardTokens(self, number, tower, (count, width), np.dtype(dtype))
                for number, count in enumerate(self.counts)
            ]
        )

    def lines(self, rows: Sequence[int]) -> list[bytes]:
        """The lines of some rows, read at the same time."""
        wanted = []
        for row in rows:
            number = self._shard_of(row)
            at = self.offsets(number)[0, row - self.starts[number] :][:2]
            wanted.append((self.text_name(number), int(at[0]), int(at[1])))
        return self.objects.ranges(wanted)

    def text_name(self, number: int) -> str:
        """The object with a shard's text."""
        return f"{shard_folder(self.names[number])}/{TEXT}"

    def rows_of(self, hashed: int) -> list[int]:
        """The rows whose ids have this hash."""
        bits = self._buckets.bit_length() - 1
        ids = self._ids_of(hashed >> (64 - bits) if bits else 0)
        low = np.searchsorted(ids[:, 0], np.uint64(hashed), side="left")
        high = np.searchsorted(ids[:, 0], np.uint64(hashed), side="right")
        return [int(row) for row in ids[low:high, 1]]

    def offsets(self, number: int) -> np.ndarray:
        """The offsets of a shard's rows, int64 [3, r + 1]."""
        found: np.ndarray = self._offsets_of(number)
        return found

    def values(self, number: int, tower: str) -> ZarrRows:
        """The tokens of a shard, one row behind the other."""
        found: ZarrRows = self._values_of(number, tower)
        return found

    def text_of(self, row: int) -> str:
        """Where the text of a row lies, for messages."""
        return self.objects.at(self.text_name(self._shard_of(row)))

    def tokens_of(self, tower: str, row: int) -> str:
        """Where the tokens of a row lie, for messages."""
        return self.objects.at(f"{shard_folder(self.names[self._shard_of(row)])}/{tower}")

    def _shard_of(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def _read_offsets(self, number: int) -> np.ndarray:
        name = f"{shard_folder(self.names[number])}/{OFFSETS}"
        shape = (len(_STREAMS), self.counts[number] + 1)
        offsets = np.asarray(ZarrRows(self.objects, name, shape, np.uint64)).astype(np.int64)
        steps = np.diff(offsets, axis=1)
        longest = [self._widths[tower][0] for tower in PARTS]
        if offsets[:, 0].any() or (steps[0] <= 0).any() or (steps < 0).any():
            raise UserError(f"{self.objects.at(name)}: it does not ascend from 0")
        if (steps[1:].max(axis=1) > longest).any():
            raise UserError(f"{self.objects.at(name)}: it has rows of more tokens than {longest}")
        self.objects.check_size(self.text_name(number), int(offsets[0, -1]))
        return offsets

    def _open_values(self, number: int, tower: str) -> ZarrRows:
        size = int(self.offsets(number)[_STREAMS.index(tower), -1])
        name = f"{shard_folder(self.names[number])}/{tower}"
        values = ZarrRows(self.objects, name, (size,), np.dtype(self._widths[tower][1]))
        return values

    def _read_ids(self, bucket: int) -> np.ndarray:
        name = ids_name(bucket)
        ids = np.asarray(ZarrRows(self.objects, name, (-1, 2), np.uint64))
        if not (ids[1:, 0] >= ids[:-1, 0]).all():
            raise UserError(f"{self.objects.at(name)}: it does not ascend")
        if len(ids) and ids[:, 1].max() >= self.starts[-1]:
            raise UserError(
                f"{self.objects.at(name)}: it has other rows than 0 to {self.starts[-1] - 1}"
            )
        return ids


class ShardTokens(Rows):
    """The tokens of a shard's rows for one tower, padded with 0 when they are read."""

    def __init__(
        self,
        files: ShardedFiles,
        number: int,
        tower: str,
        shape: tuple[int, int],
        dtype: np.dtype,
    ) -> None:
        self._files, self._number, self._tower = files, number, tower
        self.shape, self.dtype = shape, dtype

    def _ends(self) -> np.ndarray:
        return self._files.offsets(self._number)[_STREAMS.index(self._tower)]

    def lengths(self, start: int, stop: int) -> np.ndarray:
        """Tokens of some rows that follow one another."""
        return np.diff(self._ends()[start : stop + 1])

    def part(self, start: int, stop: int) -> np.ndarray:
        """See `Rows.part`."""
        ends, values = self._ends(), self._files.values(self._number, self._tower)
        flat = advised(values.part, _ANEW)(int(ends[start]), int(ends[stop]))
        return self._padded(flat, self.lengths(start, stop))

    def begin(self, rows_r: np.ndarray) -> Finish:
        """See `Rows.begin`."""
        ends, values = self._ends(), self._files.values(self._number, self._tower)
        lengths = ends[rows_r + 1] - ends[rows_r]
        begun = advised(values.begin_parts, _ANEW)(ends[rows_r], ends[rows_r + 1])
        done = advised(begun, _ANEW)
        return lambda: self._padded(done(), lengths)

    def _padded(self, flat: np.ndarray, lengths_r: np.ndarray) -> np.ndarray:
        out = np.zeros((len(lengths_r), self.shape[1]), self.dtype)
        out[np.arange(self.shape[1]) < lengths_r[:, None]] = flat
        return out
