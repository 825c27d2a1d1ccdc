"""T5X checkpoints of T5 as readers, and readers as T5X checkpoints.

The names of an unscanned T5X checkpoint are this project's. Scanned ones: `t5x_scanned`, and
`t5x_moments` for the optimiser's state.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.interop import t5_names
from atlas_jax.interop.t5x_files import Leaves, find_checkpoint, read_leaves, write_leaves
from atlas_jax.interop.t5x_moments import (
    scanned_empty,
    scanned_state,
    unscanned_empty,
    unscanned_state,
)
from atlas_jax.interop.t5x_scanned import RELPOS, is_scanned, scanned, unscanned
from atlas_jax.interop.tensors import Part, Tensor, Tensors, not_allowed, of_array

_MAX_DISTANCE = 128  # of relative positions, fixed in T5X's network
_EMPTY = "empty_leaves"  # metadata of an optimiser file


def read_checkpoint(
    path: str | Path, optimizer: bool = True, allow_missing: Sequence[str] = ()
) -> Part:
    """Read a T5 that T5X saved, natively or through Orbax; zarr arrays are not read yet.

    Settings that are not in a checkpoint are T5's: 128 as the greatest relative distance, and the
    tanh form of gelu for the gated MLP.

    Args:
      optimizer: also read the optimiser state, if there is one.
      allow_missing: patterns of names (of unscanned layers) that may be missing. Then a norm's
        scale is 1 and everything else 0.

    Raises:
      UserError: see `t5x_files.read_leaves`; or this is not a T5; or its layers have different
        position tables, which a reader cannot have.
    """
    folder = find_checkpoint(path)
    leaves = read_leaves(folder)
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    target = _below(tensors, "target/")
    if not target:
        raise UserError(f"{folder}: has no parameters (optimizer/target)")
    is_stacked = is_scanned(target)
    params = unscanned(target, str(folder)) if is_stacked else target
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
        if is_stacked:
            part.optimizer = unscanned_state(part.optimizer, target, str(folder))
            part.empty = unscanned_empty(part.empty, config)
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
      UserError: names the parameter that is missing or does not fit a T5.
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
    heads, buckets = shape(f"encoder/{RELPOS}", 2)
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


# --- writing ---------------------------------------------------------------------------


def write_checkpoint(part: Part, folder: Path, scan: bool, step: int) -> Path:
    """Write `checkpoint_<step>` in an existing folder, in the form of T5X on one device.

    Args:
      scan: write the scanned layout.
      step: used if the part's optimiser state has no step.

    Raises:
      UserError: the part is not a reader, it has experts, or only some layers have a moment, so
        that it cannot be scanned.
    """
    if part.kind != "reader":
        raise UserError("a T5X checkpoint holds a T5; choose --part=reader, or write hf")
    if part.config.get("num_experts"):
        raise UserError(
            f"this reader has {part.config['num_experts']} experts in a layer, and what is written "
            "here is a plain T5; write atlas-jax"
        )
    if part.config.get("relpos_max_distance", _MAX_DISTANCE) != _MAX_DISTANCE:
        raise UserError(
            f"ReaderConfig.relpos_max_distance = {part.config['relpos_max_distance']}: T5X's "
            f"network has {_MAX_DISTANCE}, and its checkpoints say nothing of it"
        )
    params, state, empty = part.tensors, dict(part.optimizer), part.empty
    state.setdefault("step", of_array(np.asarray(step, np.int32), "step"))
    if scan:
        params = scanned(part.tensors, part.config)
        state, empty = scanned_state(state, params, part.config), scanned_empty(empty)
    target = folder / f"checkpoint_{int(state['step'].read())}"
    target.mkdir()
    leaves: Leaves = {f"target/{name}": tensor for name, tensor in params.items()}
    leaves.update({f"state/{name}": tensor for name, tensor in state.items()})
    leaves.update({f"state/{name}": what for name, what in empty.items()})
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
    text = metadata.get(_EMPTY, "{}").encode("utf-8")
    found: dict[str, Literal["nil", "map"]] = strict_json.parse_as(
        text, dict[str, Literal["nil", "map"]], f"the metadata {_EMPTY}"
    )
    return dict(found)
