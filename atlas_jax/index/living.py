"""A passage store as of one of its versions; the newest may be changed further, see `changes.py`.

Rows count living passages, so nothing that reads a store needs to know of segments or of deleted
rows. Nothing is copied: what is asked for is read from the segments that have it.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.layouts import PassageFields
from atlas_jax.core.objects import place_of
from atlas_jax.core.parts import PARTS
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.arrays import JoinedRows, TakenRows
from atlas_jax.index.passages import Manifest, PassageStore
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.index.versions import (
    FIRST,
    SEGMENTS,
    Version,
    dead_rows,
    find_version,
    first_version,
)


class LivingStore(PassageStore):
    """A store as of a version, open for reading; see `PassageStore`.

    Attributes:
      version: what it consists of.
      segments: an open store each.
      places_n: int64, for each row the row of the segments, counted one after the other.
    """

    def __init__(
        self,
        directory: Path,
        version: Version,
        segments: list[PassageStore],
        places_n: np.ndarray,
    ) -> None:
        self.directory, self.version = directory, version
        self.segments, self.places_n = segments, places_n
        self.starts = np.cumsum([0, *(one.count for one in segments)])
        self._set_rows()

    @classmethod
    def as_of(
        cls,
        directory: str | os.PathLike[str],
        as_of: str = "",
        reader_tokenizer: Tokenizer | None = None,
        retriever_tokenizer: Tokenizer | None = None,
        opened: Sequence[PassageStore] = (),
    ) -> "LivingStore":
        """Open a store as of a version or a time, see `versions.find_version`.

        Args:
          opened: segments of this store that are open already; a segment never changes.

        Raises:
          UserError: as `PassageStore.open`; there is no such version, or it is damaged.
        """
        folder = place_of(directory)
        version = find_version(folder, as_of)
        names = version["segments"] if version else [FIRST]
        known = {one.directory: one for one in opened}
        towers = reader_tokenizer, retriever_tokenizer
        places = [segment_folder(folder, name) for name in names]
        segments = [known.get(place) or PassageStore.open(place, *towers) for place in places]
        version = version or first_version(segments[0].count)
        return cls.of(folder, version, segments, dead_rows(folder, version))

    @classmethod
    def of(
        cls, folder: Path, version: Version, segments: list[PassageStore], dead: np.ndarray
    ) -> "LivingStore":
        """The store as of a version whose open segments and dead rows are at hand.

        Raises:
          UserError: the dead rows are none of these segments.
        """
        total = sum(one.count for one in segments)
        if len(dead) and not 0 <= dead[0] <= dead[-1] < total or total - len(dead) < 1:
            raise UserError(f"{folder}: version {version['version']} is damaged: its dead rows")
        return cls(folder, version, segments, np.delete(np.arange(total, dtype=np.int64), dead))

    def become(self, other: "LivingStore", places_n: np.ndarray) -> None:
        """Turn into a later version of the same store, with its rows in this order.

        Nobody may read meanwhile.
        """
        self.version, self.segments, self.starts = other.version, other.segments, other.starts
        self.places_n = places_n
        self._set_rows()

    def _set_rows(self) -> None:
        self.count = len(self.places_n)
        total, first = int(self.starts[-1]), self.segments[0]
        self.is_plain = len(self.segments) == 1 and self.count == total
        self._by_place: tuple[np.ndarray, np.ndarray] | None = None
        notes = {tower: {**first._notes(tower), "max_id": self._greatest(tower)} for tower in PARTS}
        hashes = {name: self._hash(name) for name in ("content_hash", "retriever_hash")}
        made = {**first.manifest, **hashes, **notes, "count": self.count}
        self.manifest = cast(Manifest, made)
        self.config: StoreConfig = first.config
        self.content_hash, self.retriever_hash = hashes["content_hash"], hashes["retriever_hash"]

    def _greatest(self, tower: str) -> int:
        return max(one._notes(tower)["max_id"] for one in self.segments)

    def _hash(self, name: str) -> str:
        """Of a whole segment its own hash; else of the segments and the rows that are living."""
        if self.is_plain:
            return str(getattr(self.segments[0], name))
        living = hashlib.sha256(np.sort(self.places_n).tobytes()).hexdigest()
        parts = [*(getattr(one, name) for one in self.segments), living]
        return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()

    @property
    def reader_tokens_nl(self) -> Any:
        """Reader tokens of the living rows."""
        return self._tokens_for("reader")

    @property
    def retriever_tokens_nm(self) -> Any:
        """Retriever tokens of the living rows."""
        return self._tokens_for("retriever")

    def _tokens_for(self, tower: str) -> Any:
        name = "reader_tokens_nl" if tower == "reader" else "retriever_tokens_nm"
        return self.view([getattr(one, name) for one in self.segments])

    def view(self, arrays: Sequence[Any]) -> Any:
        """The living rows of one array [n, ...] of each segment, read when they are asked for."""
        if self.is_plain and (self.places_n[1:] > self.places_n[:-1]).all():
            return arrays[0]
        return TakenRows(JoinedRows(arrays), self.places_n)

    def living(self, arrays: list[Any]) -> np.ndarray:
        """The living rows of one array [n, ...] of each segment, as one new array."""
        out = np.empty((self.count, *arrays[0].shape[1:]), arrays[0].dtype)
        for start, array in zip(self.starts[:-1], arrays, strict=True):
            at = np.flatnonzero((self.places_n >= start) & (self.places_n < start + len(array)))
            out[at] = array[self.places_n[at] - start]
        return out

    def passages(self, rows: Sequence[int]) -> list[PassageFields]:
        """See `PassageStore.passages`."""
        outside = [row for row in rows if not 0 <= row < self.count]
        if outside:
            raise IndexError(f"row {outside[0]} of a store of {self.count} passages")
        places, found = (
            [self._in_segment(row) for row in rows],
            dict[tuple[int, int], PassageFields](),
        )
        for number in {number for number, _ in places}:
            own = [row for at, row in places if at == number]
            records = self.segments[number].passages(own)
            found |= {(number, row): one for row, one in zip(own, records, strict=True)}
        return [found[place] for place in places]

    def _in_segment(self, row: int) -> tuple[int, int]:
        """The number of a row's segment, and its row there."""
        place = int(self.places_n[row])
        number = int(np.searchsorted(self.starts, place, side="right")) - 1
        return number, place - int(self.starts[number])

    def _tokens_of(self, tower: str, row: int) -> str:
        """See `PassageStore._tokens_of`."""
        number, own = self._in_segment(row)
        return self.segments[number]._tokens_of(tower, own)

    def find(self, passage_id: str) -> int | None:
        """See `PassageStore.find`."""
        for number in reversed(range(len(self.segments))):
            row = self.segments[number].find(passage_id)
            if row is not None:
                found = self._row_at(int(self.starts[number]) + row)
                if found is not None:
                    return found
        return None

    def _row_at(self, place: int) -> int | None:
        """The row of a place, None if it is deleted."""
        if self._by_place is None:
            order = np.argsort(self.places_n, kind="stable")
            self._by_place = order, self.places_n[order]
        order, sorted_n = self._by_place
        at = int(np.searchsorted(sorted_n, place))
        return int(order[at]) if at < self.count and sorted_n[at] == place else None


def segment_folder(directory: Path, name: str) -> Path:
    """Where a segment of a store lies."""
    return directory / SEGMENTS / name if name else directory
