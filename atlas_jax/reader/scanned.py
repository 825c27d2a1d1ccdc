"""Parameters of layers side by side, as one subtree with a leading axis, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.core.types import Params


def stack_layers(params: Params) -> Params:
    """Parameters of an unrolled T5 -> those of the same model with ``scan_layers``.

    Arrays on the host are stacked there. Under an active mesh, ``jnp`` would put the whole result
    on every device.

    Args:
      params: unboxed dict with ``encoder/layers_0``, ``encoder/layers_1``...

    Returns:
      The same numbers with ``encoder/layers``, stacked on a leading axis in NumPy arrays.
    """
    stacked = dict(params)
    for stack in ("encoder", "decoder"):
        rest = dict(params[stack])
        names = sorted((k for k in rest if k.startswith("layers_")), key=lambda k: int(k[7:]))
        layers = [rest.pop(name) for name in names]
        stacked[stack] = {**rest, "layers": jax.tree.map(_stack, *layers)}
    return stacked


def _stack(*arrays: Any) -> Any:
    on_host = all(isinstance(array, np.ndarray) for array in arrays)
    return np.stack(arrays) if on_host else jnp.stack(arrays)


def unstack_layers(params: Params) -> Params:
    """The inverse of ``stack_layers``, of host arrays as well: views of the stacked ones."""
    unstacked = dict(params)
    for stack in ("encoder", "decoder"):
        rest = dict(params[stack])
        layers = rest.pop("layers")
        count = jax.tree.leaves(layers)[0].shape[0]
        for i in range(count):
            rest[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], layers)
        unstacked[stack] = rest
    return unstacked
