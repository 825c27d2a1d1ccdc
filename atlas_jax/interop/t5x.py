"""T5X checkpoints of T5 as readers, and readers as T5X checkpoints.

The names of an unscanned T5X checkpoint are this project's. A scanned one (T5X's
`scalable_t5`) stacks the layers of a stack on axis 1, keeps the heads of attention kernels
apart and has a table of relative positions in every layer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.interop import t5_names
from atlas_jax.interop.t5x_files import Leaves, find_checkpoint, read_leaves, write_leaves
from atlas_jax.interop.tensors import (
    Part,
    Tensor,
    Tensors,
    layer_of,
    not_allowed,
    of_array,
    reshaped,
    stacked,
)

_SCAN_AXIS = 1
_MAX_DISTANCE = 128  # of relative positions, fixed in T5X's network
_RELPOS = "relpos_bias/rel_embedding"
_ATTENTION = re.compile(r"(attention|self_attention|encoder_decoder_attention)/(\w+)/kernel$")
_EMPTY = "empty_leaves"  # metadata of an optimiser file


def read_checkpoint(
    path: str | Path, optimizer: bool = True, allow_missing: Sequence[str] = ()
) -> Part:
    """Read a T5 that T5X saved, natively or through Orbax; zarr arrays are not read yet.

    What a checkpoint does not say is taken from T5: 128 as the greatest relative distance
    and the tanh form of gelu for the gated MLP.

    Args:
      optimizer: take the optimiser state along, if there is one.
      allow_missing: patterns of names (as of unscanned layers) that may be absent; a norm's
        scale is then 1 and everything else 0.

    Raises:
      UserError: see `t5x_files.read_leaves`; or it is no T5, or its layers have position
        tables of their own, which a reader has not.
    """
    folder = find_checkpoint(path)
    leaves = read_leaves(folder)
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    target = _below(tensors, "target/")
    if not target:
        raise UserError(f"{folder}: has no parameters (optimizer/target)")
    scanned = any(name.startswith("encoder/encoder/") for name in target)
    params = unscanned(target, str(folder)) if scanned else target
    config = config_of(params, str(folder))
    expected = set(t5_names.huggingface_names(config))
    absent = sorted(expected - set(params))
    refused = not_allowed(absent, allow_missing)
    if refused:
        raise UserError(f"{folder}: missing: {', '.join(refused[:8])} ({len(refused)} tensors)")
    mapped = {name: params[name] for name in sorted(expected & set(params))}
    part = Part("reader", config, mapped, source=tensors, missing=tuple(absent))
    if optimizer:
        part.optimizer = _below(tensors, "state/")
        part.empty = {n[6:]: leaf for n, leaf in leaves.items()
                      if isinstance(leaf, str) and n.startswith("state/")}  # fmt: skip
        if scanned and len(part.optimizer) > 1:
            raise UserError(
                f"{folder}: its layers are scanned, and its optimiser state with them; that "
                "cannot be taken along: add --no_optimizer"
            )
    else:
        for name in tensors:
            if name.startswith("state/"):
                part.explained[name] = "optimiser state, left out as asked"
    return part


def _below(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def config_of(params: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Fields of a ReaderConfig, from the shapes of unscanned parameters.

    Raises:
      UserError: names the parameter that is absent or fits no T5.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in params:
            raise UserError(f"{where}: {name} is missing; this is no T5")
        if len(params[name].shape) != rank:
            raise UserError(
                f"{where}: {name} has shape {list(params[name].shape)}, not rank {rank}"
            )
        return params[name].shape

    def layers(stack: str) -> int:
        numbers = [int(f[1]) for n in params if (f := re.match(rf"{stack}/layers_(\d+)/", n))]
        return max(numbers, default=-1) + 1

    vocab, width = shape(t5_names.EMBEDDING, 2)
    heads, buckets = shape(f"encoder/{_RELPOS}", 2)
    joined = shape("encoder/layers_0/attention/query/kernel", 2)[1]
    gated = "encoder/layers_0/mlp/wi_0/kernel" in params
    name = f"encoder/layers_0/mlp/{'wi_0' if gated else 'wi'}/kernel"
    if joined % heads:
        raise UserError(f"{where}: {joined} channels do not divide over {heads} heads")
    return {
        "vocab_size": vocab,
        "emb_dim": width,
        "num_heads": heads,
        "head_dim": joined // heads,
        "mlp_dim": shape(name, 2)[1],
        "num_encoder_layers": layers("encoder"),
        "num_decoder_layers": layers("decoder"),
        "mlp_activations": ("gelu", "linear") if gated else ("relu",),
        "logits_via_embedding": t5_names.HEAD not in params,
        "relpos_buckets": buckets,
    }


# --- scanned layers --------------------------------------------------------------------


def unscanned(target: Tensors, where: str) -> Tensors:
    """Parameters of T5X's scanned layout as unrolled ones with joined heads.

    Raises:
      UserError: the layers' position tables differ, which a reader cannot express.
    """
    params: Tensors = {}
    for name, tensor in target.items():
        stack, _, rest = name.partition("/")
        if not rest.startswith(f"{stack}/"):
            params[name] = tensor
            continue
        rest = rest.removeprefix(f"{stack}/")
        if len(tensor.shape) <= _SCAN_AXIS:
            raise UserError(f"{where}: {name} has no axis of layers")
        count = tensor.shape[_SCAN_AXIS]
        layers = [layer_of(tensor, _SCAN_AXIS, i) for i in range(count)]
        if rest == _RELPOS:
            tables = tensor.read()
            if not all(np.array_equal(tables[:, 0], tables[:, i]) for i in range(count)):
                raise UserError(
                    f"{where}: {name}: each layer has a table of relative positions of its own; "
                    "a reader has one for the whole stack"
                )
            params[f"{stack}/{_RELPOS}"] = layers[0]
            continue
        for i, layer in enumerate(layers):
            params[f"{stack}/layers_{i}/{rest}"] = _join_heads(rest, layer)
    return params


def scanned(params: Tensors, config: Mapping[str, Any]) -> Tensors:
    """The inverse of `unscanned`: each stack's layers on axis 1, heads apart."""
    target: Tensors = {}
    for stack in ("encoder", "decoder"):
        count = int(config[f"num_{stack}_layers"])
        first = f"{stack}/layers_0/"
        for name, tensor in params.items():
            if name.startswith(first):
                rest = name.removeprefix(first)
                layers = [
                    _split_heads(rest, params[f"{stack}/layers_{i}/{rest}"], config)
                    for i in range(count)
                ]
                target[f"{stack}/{stack}/{rest}"] = stacked(layers, _SCAN_AXIS)
            elif name == f"{stack}/{_RELPOS}":
                target[f"{stack}/{stack}/{_RELPOS}"] = stacked([tensor] * count, _SCAN_AXIS)
    for name, tensor in params.items():
        if "/layers_" not in name and not name.endswith(_RELPOS):
            target[name] = tensor
    return target


def _join_heads(name: str, tensor: Tensor) -> Tensor:
    found = _ATTENTION.match(name)
    if not found:
        return tensor
    a, b, c = tensor.shape
    return reshaped(tensor, (a * b, c) if found[2] == "out" else (a, b * c))  # heads, kv merged


def _split_heads(name: str, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
    found = _ATTENTION.match(name)
    if not found:
        return tensor
    heads = (int(config["num_heads"]), int(config["head_dim"]))
    rows, columns = tensor.shape
    return reshaped(tensor, (*heads, columns) if found[2] == "out" else (rows, *heads))


# --- writing ---------------------------------------------------------------------------


def write_checkpoint(part: Part, folder: Path, scan: bool, step: int) -> Path:
    """Write `checkpoint_<step>` below an existing folder, as T5X on one device does.

    Args:
      scan: in the scanned layout.
      step: written where the part's optimiser state has none.

    Raises:
      UserError: the part is no reader, or has optimiser state that cannot be scanned.
    """
    if part.kind != "reader":
        raise UserError("a T5X checkpoint holds a T5; choose --part=reader, or write hf")
    if part.config.get("relpos_max_distance", _MAX_DISTANCE) != _MAX_DISTANCE:
        raise UserError(
            f"ReaderConfig.relpos_max_distance = {part.config['relpos_max_distance']}: T5X's "
            f"network has {_MAX_DISTANCE}, and its checkpoints say nothing of it"
        )
    state = dict(part.optimizer)
    if scan and len(state) > 1:
        raise UserError("optimiser state is not scanned; add --no_optimizer")
    state.setdefault("step", of_array(np.asarray(step, np.int32), "step"))
    params = scanned(part.tensors, part.config) if scan else part.tensors
    target = folder / f"checkpoint_{int(state['step'].read())}"
    target.mkdir()
    leaves: Leaves = {f"target/{name}": tensor for name, tensor in params.items()}
    leaves.update({f"state/{name}": tensor for name, tensor in state.items()})
    leaves.update({f"state/{name}": what for name, what in part.empty.items()})
    # T5X keeps in TensorStore what has logical axes: parameters, and moments of their shape.
    inline = {f"state/{name}" for name, tensor in state.items() if not _whole(name, tensor, params)}
    write_leaves(target, dict(sorted(leaves.items())), inline)
    return target


def _whole(name: str, tensor: Tensor, params: Tensors) -> bool:
    """Whether a leaf of the state has the shape of the parameter it belongs to."""
    path = name.removeprefix("param_states/")
    parent, _, last = path.rpartition("/")
    if last in ("m", "v") and parent in params:
        return tensor.shape == params[parent].shape
    numbered = re.match(r"(?:\d+/)+(?:mu|nu|trace)/(.*)$", path)
    return bool(numbered and numbered[1] in params and tensor.shape == params[numbered[1]].shape)


def empty_to_text(empty: Mapping[str, str]) -> dict[str, str]:
    """The state's leaves without arrays, as metadata of a safetensors file."""
    return {_EMPTY: json.dumps(dict(empty))} if empty else {}


def empty_from_text(metadata: Mapping[str, str]) -> dict[str, str]:
    """The inverse of `empty_to_text`."""
    return dict(json.loads(metadata.get(_EMPTY, "{}")))
