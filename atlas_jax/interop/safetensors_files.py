"""Read and write safetensors, one tensor at a time, with shards as in Hugging Face.

The library is used to read. It is not used to write, since it needs all tensors in memory. The
format is a length (8 bytes, little-endian), a JSON header, and the bytes.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError, one_line
from atlas_jax.core.paths import input_file
from atlas_jax.interop.tensors import BFLOAT16, Tensor, Tensors, checked_finite

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_LONGEST_HEADER = 100_000_000  # bytes, as in the library
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_file(path: str | os.PathLike[str]) -> Tensors:
    """The tensors of one file.

    Raises:
      UserError: the file is missing, cut off or damaged, or a tensor has a type that no model
        uses (it is named).
    """
    return _open(Path(path))[0]


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of one file, all in memory; errors as `read_file`, or one is not finite."""
    described = read_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in described}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return {name: checked_finite(array, f"{path}: {name}") for name, array in arrays.items()}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts in a file's header; errors as `read_file`."""
    return _open(Path(path))[1]


def _open(path: Path) -> tuple[Tensors, dict[str, str]]:
    input_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            described = {}
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(name)
                described[name] = (tuple(part.get_shape()), part.get_dtype())
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError, ValueError) as error:
        cut = _what_is_cut(path)
        raise UserError(f"{path}: {cut}not a whole safetensors file: {one_line(error)}") from None
    tensors = {}
    for name, (shape, kind) in described.items():
        if kind not in _DTYPES:
            raise UserError(f"{path}: {name} is of type {kind}; known are {', '.join(_DTYPES)}")
        tensors[name] = _lazy(path, name, shape, _DTYPES[kind])
    return tensors, metadata


def _what_is_cut(path: Path) -> str:
    """Name of the first tensor that is cut off, with a colon; '' if none is."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= _LONGEST_HEADER else b""
        places = {
            name: tuple(map(int, entry["data_offsets"]))
            for name, entry in strict_json.parse(text, str(path)).items()
            if name != "__metadata__"
        }
        beyond = {n: end for n, (_, end) in places.items() if 8 + length + end > size}
        if not beyond:
            return ""
        name = min(beyond, key=lambda name: beyond[name])
        start, end = places[name]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return ""  # the header itself is damaged
    there = max(size - 8 - length - start, 0)
    return f"{name} has {there} of {end - start} bytes: "


def _lazy(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    def get() -> np.ndarray:
        try:
            with safe_open(path, framework="numpy") as file:
                array: np.ndarray = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: {name} cannot be read: {error}") from None
        return array

    return Tensor(shape, dtype, get, f"{path}: {name}", (name,))


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file; no more than one tensor is in memory at a time.

    Not atomic: write to a folder that gets its final name when it is complete.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the bytes begin at a multiple of 8
    with Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            array = tensor.read()
            file.write(array.reshape(-1).view(np.uint8).data)
            del array
        file.flush()
        os.fsync(file.fileno())


def write_sharded(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], max_bytes: int
) -> list[str]:
    """Write `model.safetensors`, or shards of at most `max_bytes` and their index.

    Returns:
      The names of the files.
    """
    shards: list[Tensors] = [{}]
    room = max_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    metadata = {"format": "pt"}  # transformers refuses files without it
    if len(shards) == 1:
        write_file(Path(folder) / SINGLE, tensors, metadata)
        return [SINGLE]
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        write_file(Path(folder) / file, shard, metadata)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {n: file for file, shard in zip(files, shards, strict=True) for n in shard},
    }
    (Path(folder) / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return [*files, INDEX]
