"""Arrays that are read a few rows at a time: zarr on a disk or in a bucket, and views of several.

An array is written as zarr 3: not compressed, cut into chunks along its first axis alone. So each
row is a part of one object, and is read without the rest of its chunk. A missing chunk is an error;
zarr itself would read zeros.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
from msgspec import Meta

from atlas_jax.core import bounds, strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.core.objects import Objects, Pending, finish, open_array, problem_of

CHUNK = 1 << 16  # rows
_BLOCK = 1 << 16  # rows copied at a time
_TYPES = ("uint8", "int8", "uint16", "int32", "uint32", "uint64", "float32", "bfloat16")
_RAW = [{"name": "bytes", "configuration": {"endian": "little"}}]

Finish = Callable[[], np.ndarray]


class Rows:
    """An array [n, ...] that is not in memory; what is asked for is read.

    Attributes:
      shape, dtype: as NumPy's.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    def begin(self, rows_r: np.ndarray) -> Finish:
        """Begin to read some rows; call the result to have them [r, ...]."""
        raise NotImplementedError

    def part(self, start: int, stop: int) -> np.ndarray:
        """Rows that follow one another; none is beyond the last."""
        return self.begin(np.arange(start, stop))()

    def lengths(self, start: int, stop: int) -> np.ndarray | None:
        """Of some rows up to their padding, where that is known without reading them."""
        return None

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: Any) -> np.ndarray:
        if isinstance(at, tuple):
            rows = self[at[0]]
            rest = at[1:] if isinstance(at[0], int | np.integer) else (slice(None), *at[1:])
            return rows[rest]
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            return self.part(start, max(start, stop))
        rows = np.asarray(at)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        if rows.size and not -len(self) <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of an array of {len(self)}")
        flat = np.where(rows < 0, rows + len(self), rows).reshape(-1).astype(np.int64)
        return self.begin(flat)().reshape(*rows.shape, *self.shape[1:])

    def blocks(self, rows: int = _BLOCK) -> Iterator[np.ndarray]:
        """The array, so many rows at a time."""
        for start in range(0, len(self), rows):
            yield self.part(start, min(start + rows, len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        out = np.empty(self.shape, self.dtype)
        for start in range(0, len(self), _BLOCK):
            stop = min(start + _BLOCK, len(self))
            out[start:stop] = self.part(start, stop)
        return out if dtype is None else out.astype(dtype, copy=False)


class _Grid(TypedDict):
    configuration: dict[Literal["chunk_shape"], list[bounds.AtLeast1]]
    name: Literal["regular"]


class _Zarr(TypedDict):
    """The fields of zarr.json that decide how an array is read."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=1 << 48)]], Meta(min_length=1)]
    data_type: str
    chunk_grid: _Grid
    chunk_key_encoding: Any
    codecs: Any


class ZarrRows(Rows):
    """A zarr array that is there."""

    def __init__(self, objects: Objects, name: str, shape: tuple[int, ...], *types: Any) -> None:
        """Open it.

        Args:
          shape: that it must have; -1 = any length.
          types: one of which it must have.

        Raises:
          UserError: it is missing, damaged, compressed, or of another shape or type.
        """
        self._objects, self._name = objects, name
        self.where = objects.at(name)
        where = objects.at(f"{name}/zarr.json")
        found: _Zarr = strict_json.parse_as(objects.read(f"{name}/zarr.json"), _Zarr, where)
        chunk = found["chunk_grid"]["configuration"].get("chunk_shape", [])
        kinds = [np.dtype(one).name for one in types]
        fits = len(found["shape"]) == len(shape) and all(
            want in (-1, has) for want, has in zip(shape, found["shape"], strict=True)
        )
        if not fits or found["data_type"] not in kinds:
            wanted = [("any" if one < 0 else one) for one in shape]
            raise UserError(
                f"{where}: holds {bounds.shown(found['data_type'])} {found['shape']} instead of "
                f"{' or '.join(kinds)} {wanted}"
            )
        keys = found["chunk_key_encoding"]
        is_usual = isinstance(keys, dict) and keys.get("name") == "default"
        raw = [_RAW, [{"name": "bytes"}]] if found["data_type"] in ("int8", "uint8") else [_RAW]
        if found["codecs"] not in raw or not is_usual or chunk[1:] != found["shape"][1:]:
            raise UserError(f"{where}: it is compressed, or its chunks are not whole rows")
        # TensorStore has taught NumPy the name bfloat16.
        self.shape, self.dtype = tuple(found["shape"]), np.dtype(found["data_type"])
        self.chunk = chunk[0]
        self._row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._known: set[int] = set()

    def _key(self, number: int) -> str:
        """The object of a chunk, known to be whole.

        A chunk has room for all its rows, also the last one of an array.
        """
        key = f"{self._name}/{chunk_key(number, self.ndim)}"
        if number not in self._known:
            self._objects.check_size(key, self.chunk * self._row_bytes)
            self._known.add(number)
        return key

    def part(self, start: int, stop: int) -> np.ndarray:
        """See `Rows.part`."""
        return self.begin_parts(np.array([start]), np.array([stop]))()

    def begin(self, rows_r: np.ndarray) -> Finish:
        """See `Rows.begin`."""
        return self.begin_parts(rows_r, rows_r + 1)

    def begin_parts(self, starts_p: np.ndarray, stops_p: np.ndarray) -> Finish:
        """Begin to read several parts of the array; they come one behind the other."""
        size, chunk = self._row_bytes, self.chunk
        wanted = []
        for start, stop in zip(starts_p.tolist(), stops_p.tolist(), strict=True):
            while start < stop:
                number, own = divmod(start, chunk)
                end = min(stop - number * chunk, chunk)
                wanted.append((self._key(number), own * size, end * size))
                start = number * chunk + end
        done = self._objects.begin_ranges(wanted)
        return lambda: self._made(done(), int((stops_p - starts_p).sum()))

    def _made(self, raw: list[bytes], rows: int) -> np.ndarray:
        flat = np.frombuffer(b"".join(raw) if len(raw) != 1 else raw[0], np.uint8)
        little = self.dtype.newbyteorder("<") if self.dtype.kind in "uif" else self.dtype
        return flat.view(little).reshape(rows, *self.shape[1:])


def chunk_key(number: int, ndim: int) -> str:
    """The name of a chunk below its array."""
    return "/".join(["c", str(number), *["0"] * (ndim - 1)])


class NewZarr:
    """A zarr array that is being made; whole chunks are written, by any number of processes."""

    def __init__(
        self, objects: Objects, name: str, shape: tuple[int, ...], dtype: Any, chunk: int = CHUNK
    ) -> None:
        """Begin to make it, or open what is there of it.

        Args:
          dtype: one of those that zarr and an index have in common.
        """
        self.chunk, self.shape = max(1, min(chunk, shape[0])), shape
        metadata = {
            "shape": list(shape),
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.chunk, *shape[1:]]},
            },
            "data_type": np.dtype(dtype).name,
            "codecs": _RAW,
        }
        assert metadata["data_type"] in _TYPES
        self._opened = open_array(
            {
                "driver": "zarr3",
                "kvstore": objects.spec(name),
                "metadata": metadata,
                "create": True,
                "open": True,
                "store_data_equal_to_fill_value": True,
            }
        )

    def begin(self, start: int, rows: np.ndarray) -> Pending:
        """Begin to write rows that make whole chunks; `finish` waits for them.

        Raises:
          OSError: the array cannot be made, or what is there of it is damaged.
        """
        try:
            opened = self._opened.result()
        except (ValueError, RuntimeError) as error:
            raise OSError(problem_of(error)) from error
        pending: Pending = opened[start : start + len(rows)].write(rows).commit
        return pending


def write_zarr(objects: Objects, name: str, array: np.ndarray, chunk: int = CHUNK) -> None:
    """Write an array from memory.

    Raises:
      OSError: it cannot be written.
    """
    finish(begin_zarr(objects, name, array, chunk))


def begin_zarr(
    objects: Objects, name: str, array: np.ndarray, chunk: int = CHUNK
) -> Iterator[Pending]:
    """Begin to write an array from memory, when the first of the results is asked for."""
    made = NewZarr(objects, name, array.shape, array.dtype, chunk)
    return _rest(made, array)


def _rest(made: NewZarr, array: np.ndarray) -> Iterator[Pending]:
    if len(array):
        yield made.begin(0, array)
    else:
        yield made._opened


class JoinedRows(Rows):
    """Arrays of like rows, one behind the other."""

    def __init__(self, arrays: Sequence[Any]) -> None:
        """Read nothing; each is `Rows` or a NumPy array."""
        self._arrays = arrays
        self.starts = np.cumsum([0, *(len(one) for one in arrays)])
        first = arrays[0]
        self.shape, self.dtype = (int(self.starts[-1]), *first.shape[1:]), first.dtype

    def part(self, start: int, stop: int) -> np.ndarray:
        """See `Rows.part`."""
        found = [np.asarray(array[a:b]) for array, a, b in self._parts(start, stop)]
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.empty((0, *self.shape[1:]), self.dtype)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Any, int, int]]:
        """The arrays that have some rows, and which of their own rows these are."""
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            first, end = int(self.starts[number]), int(self.starts[number + 1])
            if end > start:
                yield self._arrays[number], start - first, min(stop, end) - first
            start, number = max(start, end), number + 1

    def lengths(self, start: int, stop: int) -> np.ndarray | None:
        """See `Rows.lengths`."""
        found = [
            array.lengths(a, b) if isinstance(array, Rows) else None
            for array, a, b in self._parts(start, stop)
        ]
        if any(one is None for one in found):
            return None
        return np.concatenate(found) if found else np.zeros(0, np.int64)  # type: ignore[arg-type]

    def begin(self, rows_r: np.ndarray) -> Finish:
        """See `Rows.begin`."""
        numbers = np.searchsorted(self.starts, rows_r, side="right") - 1
        begun = []
        for number in np.unique(numbers).tolist():
            at = np.flatnonzero(numbers == number)
            begun.append((at, begin_rows(self._arrays[number], rows_r[at] - self.starts[number])))

        def finished() -> np.ndarray:
            out = np.empty((len(rows_r), *self.shape[1:]), self.dtype)
            for at, done in begun:
                out[at] = done()
            return out

        return finished


class TakenRows(Rows):
    """Some rows of an array, in an order of their own."""

    def __init__(self, array: Any, rows_n: np.ndarray) -> None:
        """Read nothing; the array is `Rows` or NumPy's."""
        self._array, self._rows_n = array, rows_n
        self.shape, self.dtype = (len(rows_n), *array.shape[1:]), array.dtype

    def part(self, start: int, stop: int) -> np.ndarray:
        """See `Rows.part`; rows that lie together are read together."""
        rows = self._rows_n[start:stop]
        cuts = np.flatnonzero(np.diff(rows) != 1) + 1
        if len(cuts) > max(8, len(rows) // 8):
            return self.begin(np.arange(start, stop))()
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for a, b in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)], strict=True):
            if b > a:
                out[a:b] = self._array[int(rows[a]) : int(rows[a]) + b - a]
        return out

    def begin(self, rows_r: np.ndarray) -> Finish:
        """See `Rows.begin`."""
        return begin_rows(self._array, self._rows_n[rows_r])


def begin_rows(array: Any, rows_r: np.ndarray) -> Finish:
    """`Rows.begin` of any array."""
    if isinstance(array, Rows):
        return array.begin(rows_r)
    return functools.partial(np.take, array, rows_r, axis=0)
