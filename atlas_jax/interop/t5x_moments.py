"""The optimiser's state of T5X's scanned layout, and the same of unrolled layers.

A moment with its parameter's shape is converted like the parameter. Factored moments of Adafactor
differ (t5x/adafactor.py). For a scanned kernel T5X keeps `v_row` over the embedding and `v_col`
over the other axes (logical rules). For an unscanned one `v_row` is over the shorter axis (the
heuristic for two axes). Both are means of the same squares, so they only change places. Kernels
with an axis shorter than 128, which T5X factors only in the scanned layout, stay as they are.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.interop.t5x_scanned import (
    SCAN_AXIS,
    is_scanned,
    layer_count,
    rolled,
    scanned_name,
    unrolled,
    unrolled_names,
)
from atlas_jax.interop.tensors import Tensor, Tensors, layer_of, reshaped, stacked

# The text before the parameter's name, the name, and the text after it.
_OPTAX = re.compile(r"(param_states/(?:\d+/)+\w+/)(.+)()$")
_ADAFACTOR = re.compile(r"(param_states/)(.+?)((?:/(?:m|v|v_row|v_col))?)$")
_OTHER = {"/v_row": "/v_col", "/v_col": "/v_row"}
_TO_EMBEDDING = re.compile(r"/(out|wo)/kernel$")  # kernels whose last axis is the embedding
_FILLER = (1,)  # shape of a moment that T5X does not keep


def unscanned_state(state: Tensors, target: Tensors, where: str) -> Tensors:
    """Convert the state of scanned parameters to that of unrolled ones.

    Args:
      state: `step`, `param_states/...`.
      target: the scanned parameters.

    Raises:
      UserError: names an entry that belongs to no parameter, has a wrong shape, or belongs to
        position tables and differs between layers.
    """
    made: Tensors = {}
    for name, tensor in state.items():
        before, param, after = _parts(name)
        if not is_scanned([param]):
            made[name] = tensor
            continue
        if param not in target:
            raise UserError(f"{where}: {name} belongs to no parameter of the checkpoint")
        shape = target[param].shape
        names = unrolled_names(param, shape[SCAN_AXIS]) or []
        if tensor.shape == _FILLER:
            layers = dict.fromkeys(names, tensor)
        elif after in _OTHER:
            _demand(tensor, _factor_shape(param, after, shape), f"{where}: {name}")
            axis = _kept(param, after, len(shape)).index(SCAN_AXIS)
            layers = {one: _flat(layer_of(tensor, axis, i)) for i, one in enumerate(names)}
            after = _changed_places(param, after, shape)
        else:
            _demand(tensor, shape, f"{where}: {name}")
            layers = unrolled(param, tensor, f"{where}: {name}")
        made.update({f"{before}{one}{after}": layer for one, layer in layers.items()})
    return made


def scanned_state(state: Tensors, target: Tensors, config: Mapping[str, Any]) -> Tensors:
    """The inverse of `unscanned_state`; the moments of position tables are repeated by layer.

    Args:
      state: of unrolled parameters.
      target: the scanned parameters.
      config: fields of the ReaderConfig.

    Raises:
      UserError: names a layer's moment that is missing while other layers have it.
    """
    made: Tensors = {}
    for name, tensor in state.items():
        before, param, after = _parts(name)
        goes = scanned_name(param)
        if goes is None:
            made[name] = tensor
            continue
        shape = target[goes].shape
        factored = after in _OTHER and tensor.shape != _FILLER
        placed = _changed_places(goes, after, shape) if factored else after
        if f"{before}{goes}{placed}" in made:
            continue
        names = unrolled_names(goes, layer_count(goes, config)) or []
        layers = [_of_layer(state, f"{before}{one}{after}") for one in names]
        if tensor.shape == _FILLER:
            whole = _same(layers)
        elif factored:
            kept = _kept(goes, placed, len(shape))
            one_layer = tuple(shape[axis] for axis in kept if axis != SCAN_AXIS)
            split = [reshaped(layer, one_layer) for layer in layers]
            whole = stacked(split, kept.index(SCAN_AXIS))
        else:
            whole = rolled(goes, layers, config)
        made[f"{before}{goes}{placed}"] = whole
    return made


def unscanned_empty(empty: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """Leaves without arrays under the names of unrolled layers."""
    made = {}
    for name, what in empty.items():
        before, param, after = _parts(name)
        count = layer_count(param, config) if is_scanned([param]) else 0
        for one in unrolled_names(param, count) or [param]:
            made[f"{before}{one}{after}"] = what
    return made


def scanned_empty(empty: Mapping[str, str]) -> dict[str, str]:
    """The inverse of `unscanned_empty`."""
    made = {}
    for name, what in empty.items():
        before, param, after = _parts(name)
        made[f"{before}{scanned_name(param) or param}{after}"] = what
    return made


def _parts(name: str) -> tuple[str, str, str]:
    """What stands before a parameter's name in a leaf of the state, the name, and what after."""
    found = _OPTAX.match(name) or _ADAFACTOR.match(name)
    return (found[1], found[2], found[3]) if found else ("", name, "")


def _kept(param: str, factor: str, rank: int) -> list[int]:
    """The axes of a scanned kernel that a factor has: the layers', and others of the kernel."""
    embedding = rank - 1 if _TO_EMBEDDING.search(param) else 0
    if factor == "/v_row":
        return sorted({embedding, SCAN_AXIS})
    return [axis for axis in range(rank) if axis != embedding]


def _factor_shape(param: str, factor: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _kept(param, factor, len(shape)))


def _changed_places(param: str, factor: str, shape: tuple[int, ...]) -> str:
    """What a factor is called in the other layout; `shape` is that of the scanned kernel."""
    to_embedding = bool(_TO_EMBEDDING.search(param))
    embedding = shape[-1 if to_embedding else 0]
    others = math.prod(shape) // (embedding * shape[SCAN_AXIS])
    rows, columns = (others, embedding) if to_embedding else (embedding, others)
    row_is_first = rows <= columns  # unscanned: v_row has the shorter axis, of equals the first
    return factor if row_is_first != to_embedding else _OTHER[factor]


def _flat(tensor: Tensor) -> Tensor:
    return reshaped(tensor, (math.prod(tensor.shape),))


def _demand(tensor: Tensor, shape: tuple[int, ...], where: str) -> None:
    if tensor.shape != shape:
        raise UserError(
            f"{where} has shape {list(tensor.shape)}; its parameter asks for {list(shape)}"
        )


def _same(layers: Sequence[Tensor]) -> Tensor:
    """One of equal tensors; reads them all."""
    first = layers[0]

    def get() -> np.ndarray:
        arrays = [layer.read() for layer in layers]
        for layer, array in zip(layers, arrays, strict=True):
            if not np.array_equal(array, arrays[0]):
                raise UserError(
                    f"{layer.where} differs from {first.where}: it cannot be "
                    "scanned; add --no_optimizer"
                )
        return arrays[0]

    sources = tuple(name for layer in layers for name in layer.sources)
    return Tensor(first.shape, first.dtype, get, first.where, sources)


def _of_layer(state: Tensors, name: str) -> Tensor:
    if name not in state:
        raise UserError(
            f"{name} is missing, and other layers have it: it cannot be scanned; add --no_optimizer"
        )
    return state[name]
