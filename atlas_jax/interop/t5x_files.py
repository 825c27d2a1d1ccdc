"""The native checkpoint format of T5X: a msgpack index and zarr arrays beside it.

    checkpoint_<step>/checkpoint               {"version": 3, "optimizer": {target, state}}
    checkpoint_<step>/target.<name>/.zarray    one array, with its chunks 0.0, 0.1, ...

A leaf of the index is an array written inline (a msgpack extension), a reference to a zarr
folder, `nil`, or an empty map. Version 2 keeps bfloat16 as the bits of uint16.

Orbax, which T5X could be told to save through since November 2022, wrote such an index until
it described its trees in `_METADATA` (November 2023; `t5x_orbax` reads those). There a leaf
is the name of its folder:

    checkpoint_<step>/checkpoint            "PLACEHOLDER://optimizer.target.<name>" (2022)
    checkpoint_<step>/state/checkpoint      "PLACEHOLDER://target.<name>", without version
                                            and 'optimizer' (since May 2023)

In November 2022 'AGGREGATED://' or nothing stood before the name; from January to May 2023
T5X wrote its own references instead.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import tensorstore

from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import check_fetched
from atlas_jax.interop import t5x_orbax
from atlas_jax.interop.tensors import BFLOAT16, Tensor, of_array, viewed
from atlas_jax.interop.zarr_arrays import Folder, read_array

_INDEX = "checkpoint"
_CHUNK_BYTES = 64 << 20  # an array is cut above it
_NDARRAY, _SCALAR = 1, 3  # msgpack extension types of flax
_CHUNKED = "__msgpack_chunked_array__"
_PLACEHOLDER = re.compile(r"(PLACEHOLDER|AGGREGATED)://")
_FOLDER = re.compile(r"checkpoint_(\d+)$")
Leaves = dict[str, Any]  # path -> Tensor, or 'nil', or 'map' (an empty one)


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The folder of one checkpoint: the given one, or the newest complete one below it.

    Raises:
      UserError: there is none. Unfinished saves (`.tmp-...`) do not count.
    """
    folder = Path(path)
    if _is_checkpoint(folder):
        return folder
    steps = {}
    if folder.is_dir():
        for child in folder.iterdir():
            found = _FOLDER.match(child.name)
            if found and _is_checkpoint(child):
                steps[int(found[1])] = child
    if not steps:
        raise UserError(f"{path}: no T5X checkpoint (a folder checkpoint_<step>) in it")
    return steps[max(steps)]


def _is_checkpoint(folder: Path) -> bool:
    state = t5x_orbax.find_state(folder)
    return state is not None or _index_of(folder).is_file()


def _index_of(folder: Path) -> Path:
    """The index of a folder, or of its folder `state`, where Orbax put it."""
    inner = folder / t5x_orbax.STATE / _INDEX
    return inner if inner.is_file() else folder / _INDEX


def read_leaves(folder: Path) -> Leaves:
    """Every leaf: 'target/...', 'state/...'; no zarr array is read yet.

    Args:
      folder: of `find_checkpoint`; native or saved through Orbax.

    Raises:
      UserError: the index is cut off, of an unknown version or refers to a place outside
        of the folder; or an array (named) is absent, incomplete or not as described.
    """
    state = t5x_orbax.find_state(folder)
    if state is not None:
        return t5x_orbax.read_leaves(state, _unpack)
    path = _index_of(folder)
    tree = _unpack(path)
    if isinstance(tree, dict) and "target" in tree and "optimizer" not in tree:
        return dict(_leaves(tree, "", path.parent, 3))  # by Orbax
    if not isinstance(tree, dict) or not isinstance(tree.get("optimizer"), dict):
        raise UserError(f"{path}: no T5X index: it has neither 'optimizer' nor 'target'")
    version = tree.get("version", 0)
    if version not in (2, 3):
        raise UserError(f"{path}: version {version!r}; this reads 2 and 3")
    return dict(_leaves(tree["optimizer"], "", path.parent, int(version)))


def _unpack(path: Path) -> Any:
    check_fetched(path)
    try:
        raw = path.read_bytes()
        return msgpack.unpackb(raw, ext_hook=_ext_hook, strict_map_key=False, raw=False)
    except (OSError, ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise UserError(f"{path}: not a whole T5X index: {error}") from None


def _leaves(node: Any, name: str, folder: Path, version: int) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and {"driver", "kvstore", "metadata"} <= set(node):
        yield name, _zarr(node, name, folder, version)
    elif isinstance(node, dict) and _CHUNKED in node:
        yield name, _joined_chunks(node, name, folder)
    elif isinstance(node, dict) and node:
        for key, child in node.items():
            yield from _leaves(child, f"{name}/{key}" if name else str(key), folder, version)
    elif isinstance(node, dict):
        yield name, "map"
    elif node is None:
        yield name, "nil"
    elif isinstance(node, np.ndarray):
        yield name, of_array(node, f"{folder / _INDEX}: {name}", (name,))
    elif isinstance(node, str):
        yield name, _named(node, name, folder)
    else:
        if not isinstance(node, (int, float)):
            raise UserError(f"{folder / _INDEX}: {name} is a {type(node).__name__}, not an array")
        yield name, of_array(np.asarray(node), f"{folder / _INDEX}: {name}", (name,))


def _ext_hook(code: int, data: bytes) -> Any:
    if code not in (_NDARRAY, _SCALAR):
        raise ValueError(f"an extension of type {code}, which T5X does not write")
    shape, dtype, raw = msgpack.unpackb(data, raw=False)
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    if kind.hasobject:
        raise ValueError(f"an array of type {dtype}")
    return np.frombuffer(raw, kind).reshape(shape).copy()


def _joined_chunks(node: dict[str, Any], name: str, folder: Path) -> Tensor:
    """Flax cuts an inline array above 2^30 bytes into a map of numbered pieces."""
    try:
        shape = tuple(int(node["shape"][str(i)]) for i in range(len(node["shape"])))
        pieces = [node["chunks"][str(i)] for i in range(len(node["chunks"]))]
        array = np.concatenate([np.asarray(piece).reshape(-1) for piece in pieces]).reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / _INDEX}: {name}: a damaged array in pieces: {error}") from None
    return of_array(array, f"{folder / _INDEX}: {name}", (name,))


def _zarr(node: dict[str, Any], name: str, folder: Path, version: int) -> Tensor:
    """A referenced array. Only the path is taken from the index; `.zarray` says the rest."""
    where = f"{folder}: {name}"
    kvstore = node["kvstore"] if isinstance(node["kvstore"], dict) else {}
    path = kvstore.get("path", node.get("path"))
    if not isinstance(path, str) or not path.strip("/"):
        raise UserError(f"{where}: the index names no folder for it")
    metadata = node["metadata"] if isinstance(node["metadata"], dict) else {}
    announced = metadata.get("shape")
    tensor = read_array(Folder(folder), path.strip("/"), where, name, announced=announced)
    return viewed(tensor, BFLOAT16) if version == 2 and tensor.dtype == np.uint16 else tensor


def _named(text: str, name: str, folder: Path) -> Tensor:
    """An array that Orbax wrote: the index has the name of its folder alone.

    Orbax left out chunks of zeros then; see `t5x_orbax` for where that is accepted.
    """
    where = f"{folder}: {name}"
    path, own = _PLACEHOLDER.sub("", text, count=1), name.replace("/", ".")
    if path not in (own, f"optimizer.{own}"):
        raise UserError(f"{where}: the index refers to {text!r}, which is not its name")
    return read_array(Folder(folder), path, where, name, not name.startswith("target/"))


# --- writing ---------------------------------------------------------------------------


def write_leaves(folder: Path, leaves: Mapping[str, Any], inline: set[str]) -> None:
    """Write a checkpoint into an existing, empty folder, one array at a time.

    Args:
      leaves: as `read_leaves` gives them.
      inline: leaves that go into the index itself.
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if isinstance(leaf, str):
            node[last] = {} if leaf == "map" else None
        elif name in inline:
            node[last] = _inline(leaf)
        else:
            node[last] = _write_zarr(folder, name.replace("/", "."), leaf)
    raw = msgpack.packb({"version": 3, "optimizer": tree}, strict_types=True)
    (folder / _INDEX).write_bytes(raw)


def _inline(tensor: Tensor) -> msgpack.ExtType:
    array = tensor.read()
    dtype = array.dtype.name
    packed = msgpack.packb((array.shape, dtype, array.tobytes()), use_bin_type=True)
    return msgpack.ExtType(_NDARRAY, packed)


def _write_zarr(folder: Path, name: str, tensor: Tensor) -> dict[str, Any]:
    chunks = chunk_shape(tensor.shape, tensor.dtype.itemsize)
    metadata = {
        "chunks": chunks,
        "compressor": {"id": "gzip", "level": 1},
        "shape": list(tensor.shape),
    }
    dtype = tensor.dtype.name
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{(folder / name).resolve()}/"},
        "metadata": {**metadata, "dtype": dtype if dtype == "bfloat16" else tensor.dtype.str},
        "create": True,
        "store_data_equal_to_fill_value": True,
    }
    tensorstore.open(spec).result().write(tensor.read()).result()
    return {
        "driver": "zarr",
        "dtype": dtype,
        "kvstore": {"driver": "file", "path": f"{name}/"},
        "metadata": metadata,
    }


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Chunks of at most 64 MiB: the largest axis goes to its next smaller divisor."""
    chunks = list(shape)
    while int(np.prod(chunks, dtype=np.int64)) * itemsize > _CHUNK_BYTES:
        axis = int(np.argmax(chunks))
        size = chunks[axis]
        if size == 1:
            break
        chunks[axis] = next(d for d in range(size - 1, 0, -1) if shape[axis] % d == 0)
    return chunks
