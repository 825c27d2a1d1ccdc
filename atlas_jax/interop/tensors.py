"""Arrays that are read one at a time, when they are needed.

A checkpoint of 11B parameters may not fit into memory. So its files are read as `Tensor`s: shape
and type at once, numbers later. A conversion maps names to tensors that are made from other
tensors. Numbers are only read when a writer needs them.
"""

import dataclasses
import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from atlas_jax.core.arrays import first_not_finite
from atlas_jax.core.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array of a checkpoint.

    Attributes:
      shape: its shape.
      dtype: its numpy type (bfloat16 is that of ml_dtypes).
      get: reads it.
      where: file and name, for error messages.
      sources: names of the arrays in the source that it is made of.
      get_slice: reads index `i` of an axis alone, where the format can.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    get: Callable[[], np.ndarray]
    where: str
    sources: tuple[str, ...] = ()
    get_slice: Callable[[int, int], np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The array, C-contiguous.

        Raises:
          UserError: the array has another shape or type than was announced.
        """
        array = np.asarray(self.get())
        if array.shape != self.shape or array.dtype != self.dtype:
            raise UserError(
                f"{self.where}: {array.dtype}{list(array.shape)} was read where "
                f"{self.dtype}{list(self.shape)} was announced; the file is damaged"
            )
        return array if array.flags.c_contiguous else np.ascontiguousarray(array)


Tensors = dict[str, Tensor]


def of_array(array: np.ndarray, where: str, sources: tuple[str, ...] = ()) -> Tensor:
    """A tensor that is in memory already."""
    return Tensor(array.shape, array.dtype, lambda: array, where, sources)


def transposed(tensor: Tensor) -> Tensor:
    """Axes in reverse order."""
    return dataclasses.replace(
        tensor, shape=tensor.shape[::-1], get=lambda: tensor.read().T, get_slice=None
    )


def reshaped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The same numbers in another shape."""
    return dataclasses.replace(
        tensor,
        shape=tuple(shape),
        get=lambda: tensor.read().reshape(tuple(shape)),
        get_slice=None,
    )


def viewed(tensor: Tensor, dtype: np.dtype) -> Tensor:
    """The same bits as another type of the same size."""
    return _changed(tensor, dtype, lambda array: array.view(dtype))


def cast(tensor: Tensor, dtype: np.dtype) -> Tensor:
    """Rounded to another floating type; integers stay as they are."""
    if tensor.dtype == dtype or tensor.dtype not in FLOATS.values():
        return tensor
    return _changed(tensor, dtype, lambda array: array.astype(dtype))


def _changed(tensor: Tensor, dtype: np.dtype, change: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """The tensor with every array that is read of it changed to another type."""
    part = tensor.get_slice
    return dataclasses.replace(
        tensor,
        dtype=dtype,
        get=lambda: change(tensor.read()),
        get_slice=None if part is None else lambda axis, i: change(part(axis, i)),
    )


def finite(tensor: Tensor) -> Tensor:
    """The same tensor; reading it raises a UserError if it holds NaN or infinity."""

    def get() -> np.ndarray:
        return checked_finite(tensor.read(), tensor.where)

    return dataclasses.replace(tensor, get=get, get_slice=None)


def checked_finite(array: np.ndarray, where: str) -> np.ndarray:
    """The same array, refused if it holds NaN or infinity (UserError)."""
    at = first_not_finite(array)
    if at is not None:
        place = list(map(int, np.unravel_index(at, array.shape)))
        raise UserError(f"{where}: the number at {place} is not finite")
    return array


def layer_of(tensor: Tensor, axis: int, i: int) -> Tensor:
    """Entry `i` of an axis; if the format can, only this entry is read."""

    def get() -> np.ndarray:
        if tensor.get_slice is not None:
            return tensor.get_slice(axis, i)
        return np.take(tensor.read(), i, axis=axis)

    shape = tensor.shape[:axis] + tensor.shape[axis + 1 :]
    return dataclasses.replace(tensor, shape=shape, get=get, get_slice=None)


def stacked(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """Equal tensors along a new axis, read one after the other."""
    first = tensors[0]
    shape = first.shape[:axis] + (len(tensors),) + first.shape[axis:]

    def get() -> np.ndarray:
        whole = np.empty(shape, first.dtype)
        for i, tensor in enumerate(tensors):
            whole[(slice(None),) * axis + (i,)] = tensor.read()
        return whole

    names = tuple(name for tensor in tensors for name in tensor.sources)
    return Tensor(shape, first.dtype, get, first.where, names)


def needed_shape(
    tensors: Mapping[str, Tensor], name: str, where: str, model: str
) -> tuple[int, ...]:
    """The shape of an array that every `model` needs.

    Raises:
      UserError: the array is missing.
    """
    if name not in tensors:
        raise UserError(f"{where}: {name} is missing; this is no whole {model}")
    return tensors[name].shape


def not_allowed(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that fit none of the patterns of a flag such as `--allow_missing`."""
    return [name for name in names if not any(fnmatch.fnmatch(name, p) for p in patterns)]


def digest(array: np.ndarray) -> str:
    """Fingerprint of type, shape and every bit of an array."""
    array = np.ascontiguousarray(array)
    value = hashlib.blake2b(f"{array.dtype}{array.shape}".encode(), digest_size=16)
    value.update(array.reshape(-1).view(np.uint8).data)
    return value.hexdigest()


def recorded(tensors: Mapping[str, Tensor], digests: dict[str, str]) -> Tensors:
    """The same tensors; when one is read, its digest is stored in `digests` under its name."""

    def one(name: str, tensor: Tensor) -> Tensor:
        def get() -> np.ndarray:
            array = tensor.read()
            digests[name] = digest(array)
            return array

        return dataclasses.replace(tensor, get=get, get_slice=None)

    return {name: one(name, tensor) for name, tensor in tensors.items()}


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """What a checkpoint says of its texts.

    Attributes:
      query_prompt, passage_prompt: what stands before every query and passage.
      longest: tokens kept of a text; 0 = as many as the model has positions.
      lowercases: letters are made small before a text is encoded.
      remarks: what else was done or could not be taken over, for people.
    """

    query_prompt: str = ""
    passage_prompt: str = ""
    longest: int = 0
    lowercases: bool = False
    remarks: tuple[str, ...] = ()


@dataclasses.dataclass
class Part:
    """One model of a checkpoint, in this project's names.

    Attributes:
      kind: 'reader' or 'retriever'.
      config: fields of its ReaderConfig or RetrieverConfig.
      tensors: parameters by '/'-joined name; layers unrolled.
      tokenizer: text of its tokenizer.json, if one came along.
      tokenizer_file: where that came from, for messages.
      optimizer: optimiser state under T5X's names: `step`, `param_states/...`.
      empty: leaves of the optimiser state that hold no array: name -> 'nil' or 'map'.
      source: every array of the source by the source's name.
      explained: arrays of the source that need not be used, and why.
      missing: arrays that the source lacks and that were allowed to be filled in.
      texts: what the source says of the texts that the model is given.
    """

    kind: str
    config: dict[str, Any]
    tensors: Tensors
    tokenizer: str | None = None
    optimizer: Tensors = dataclasses.field(default_factory=dict)
    empty: dict[str, str] = dataclasses.field(default_factory=dict)
    source: Tensors = dataclasses.field(default_factory=dict)
    explained: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: tuple[str, ...] = ()
    texts: TextSettings = TextSettings()
    tokenizer_file: str = ""

    def unused(self) -> list[str]:
        """Arrays of the source that are neither used nor explained."""
        made = {**self.tensors, **{f"optimizer/{k}": v for k, v in self.optimizer.items()}}
        used = {name for tensor in made.values() for name in tensor.sources}
        return [name for name in self.source if name not in used and name not in self.explained]
