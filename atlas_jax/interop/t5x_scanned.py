"""T5X's scanned layout (`scalable_t5`): a stack's layers on axis 1 of one array.

The heads of attention kernels stand apart, and every layer has a table of relative positions.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.interop.tensors import Tensor, Tensors, layer_of, reshaped, stacked

SCAN_AXIS = 1
RELPOS = "relpos_bias/rel_embedding"
_SCANNED = re.compile(r"(encoder|decoder)/\1/(.*)$")
_LAYER = re.compile(r"(encoder|decoder)/(?:layers_(\d+)/(.*)|(relpos_bias/rel_embedding))$")
_ATTENTION = re.compile(r"(attention|self_attention|encoder_decoder_attention)/(\w+)/kernel$")


def is_scanned(names: Iterable[str]) -> bool:
    """Whether parameters of these names are in this layout."""
    return any(_SCANNED.match(name) for name in names)


def scanned_name(name: str) -> str | None:
    """The scanned name that an unrolled one goes into; None where it is in no layer."""
    found = _LAYER.match(name)
    return f"{found[1]}/{found[1]}/{found[3] or found[4]}" if found else None


def unrolled_names(name: str, layers: int) -> list[str] | None:
    """The unrolled names that a scanned one holds, by layer; None where it is of no layer."""
    found = _SCANNED.match(name)
    if found is None:
        return None
    if found[2] == RELPOS:
        return [f"{found[1]}/{RELPOS}"]
    return [f"{found[1]}/layers_{i}/{found[2]}" for i in range(layers)]


def unscanned(target: Tensors, where: str) -> Tensors:
    """Parameters of the scanned layout as unrolled ones with joined heads.

    Raises:
      UserError: the layers' position tables differ, which a reader cannot express.
    """
    params: Tensors = {}
    for name, tensor in target.items():
        if _SCANNED.match(name):
            params.update(unrolled(name, tensor, f"{where}: {name}"))
        else:
            params[name] = tensor
    return params


def unrolled(name: str, tensor: Tensor, where: str) -> Tensors:
    """One array of the scanned layout, as large as the parameter `name`, by unrolled name.

    Raises:
      UserError: see `unscanned`.
    """
    if len(tensor.shape) <= SCAN_AXIS:
        raise UserError(f"{where} has no axis of layers")
    layers = [layer_of(tensor, SCAN_AXIS, i) for i in range(tensor.shape[SCAN_AXIS])]
    if name.endswith(RELPOS):
        tables = tensor.read()
        if not all(np.array_equal(tables[:, 0], tables[:, i]) for i in range(len(layers))):
            raise UserError(
                f"{where}: each layer has a table of relative positions of its own; "
                "a reader has one for the whole stack"
            )
        layers = layers[:1]
    names = unrolled_names(name, len(layers)) or []
    return {one: _join_heads(one, layer) for one, layer in zip(names, layers, strict=True)}


def scanned(params: Tensors, config: Mapping[str, Any]) -> Tensors:
    """The inverse of `unscanned`: each stack's layers on axis 1, heads apart."""
    target: Tensors = {}
    for name, tensor in params.items():
        goes = scanned_name(name)
        if goes is None:
            target[name] = tensor
        elif goes not in target:
            names = unrolled_names(goes, layer_count(goes, config)) or []
            target[goes] = rolled(goes, [params[one] for one in names], config)
    return target


def rolled(name: str, layers: Sequence[Tensor], config: Mapping[str, Any]) -> Tensor:
    """The inverse of `unrolled`; the one table of positions is repeated for every layer."""
    if name.endswith(RELPOS):
        layers = [layers[0]] * layer_count(name, config)
    return stacked([_split_heads(name, layer, config) for layer in layers], SCAN_AXIS)


def layer_count(name: str, config: Mapping[str, Any]) -> int:
    """Layers of the stack that a parameter is in."""
    return int(config[f"num_{name.partition('/')[0]}_layers"])


def _join_heads(name: str, tensor: Tensor) -> Tensor:
    found = _ATTENTION.search(name)
    if not found:
        return tensor
    a, b, c = tensor.shape
    return reshaped(tensor, (a * b, c) if found[2] == "out" else (a, b * c))  # heads, kv merged


def _split_heads(name: str, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
    found = _ATTENTION.search(name)
    if not found:
        return tensor
    heads = (int(config["num_heads"]), int(config["head_dim"]))
    rows, columns = tensor.shape
    return reshaped(tensor, (*heads, columns) if found[2] == "out" else (rows, *heads))
