"""Checkpoints that T5X saved through Orbax, which it does by default since February 2024.

Those from before November 2023 have no `_METADATA`: `t5x_files` reads them.

    checkpoint_<step>/state/_METADATA        the tree: a key and a kind for every leaf
    checkpoint_<step>/state/manifest.ocdbt   the arrays, in an OCDBT database (with d/, ...)
    checkpoint_<step>/state/<name>/.zarray   the arrays, as folders (until July 2024)
    checkpoint_<step>/state/checkpoint       msgpack of leaves kept apart (until June 2024)

An array is called like its path with '.' between the parts. T5X writes zarr of version 2.
Until November 2024 Orbax left out chunks that are zero all over. In a database nothing can
be lost unnoticed, so there they are read as zeros; in folders only in the state of the
optimiser, where zeros are usual.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError, one_line
from atlas_jax.interop.tensors import of_array
from atlas_jax.interop.zarr_arrays import MANIFEST, Database, Folder, Store, read_array

STATE = "state"
_METADATA = "_METADATA"
_AGGREGATE = "checkpoint"
_EMPTY = {"Dict": "map", "None": "nil"}  # kinds of leaves that hold no array


def find_state(path: Path) -> Path | None:
    """The folder that Orbax wrote: `path` itself, or its folder `state`; None if neither."""
    return next((f for f in (path, path / STATE) if (f / _METADATA).is_file()), None)


def read_leaves(folder: Path, unpack: Callable[[Path], Any]) -> dict[str, Any]:
    """Every leaf: 'target/...', 'state/...'; no array is read yet.

    Args:
      folder: of `find_state`.
      unpack: reads a msgpack file of T5X.

    Returns:
      Path to Tensor, or to 'nil' or 'map' (an empty one).

    Raises:
      UserError: `_METADATA` is damaged; or an array (named) is absent, incomplete or of a
        kind that T5X does not write.
    """
    path = folder / _METADATA
    try:
        meta: dict[str, Any] = strict_json.read(path, dict[str, Any])
        leaves = list(_described(meta["tree_metadata"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a whole Orbax checkpoint: {one_line(repr(error))}") from None
    if meta.get("use_zarr3"):
        raise UserError(f"{path}: its arrays are zarr of version 3; T5X writes version 2")
    database = (folder / MANIFEST).is_file()
    store: Store = Database(folder) if database else Folder(folder)
    zeros_stored = bool(meta.get("store_array_data_equal_to_fill_value"))
    aggregate: Any = None
    found: dict[str, Any] = {}
    for parts, kind, apart in leaves:
        name = "/".join(parts)
        where = f"{folder}: {name}"
        if kind in _EMPTY:
            found[name] = _EMPTY[kind]
        elif kind not in ("jax.Array", "np.ndarray", "scalar"):
            raise UserError(f"{where} is a {kind}, not an array")
        elif apart:
            aggregate = unpack(folder / _AGGREGATE) if aggregate is None else aggregate
            found[name] = of_array(_leaf(aggregate, parts, where), where, (name,))
        else:
            left_out = not zeros_stored and (database or parts[0] != "target")
            found[name] = read_array(store, ".".join(parts), where, name, left_out)
    return found


def _described(tree: Mapping[str, Any]) -> Iterator[tuple[list[str], str, bool]]:
    """Path, kind, and whether the leaf lies in the msgpack file."""
    for entry in tree.values():
        parts = [str(key["key"]) for key in entry["key_metadata"]]
        if not parts or any(part in ("", ".", "..") or "/" in part for part in parts):
            raise ValueError(f"the path {parts}")
        value = entry["value_metadata"]
        yield parts, str(value["value_type"]), bool(value["skip_deserialize"])


def _leaf(tree: Any, parts: list[str], where: str) -> np.ndarray:
    for part in parts:
        tree = tree.get(part) if isinstance(tree, dict) else None
    if not isinstance(tree, (np.ndarray, int, float)):
        raise UserError(f"{where}: is not in {_AGGREGATE}, where {_METADATA} says it is")
    return np.asarray(tree)
