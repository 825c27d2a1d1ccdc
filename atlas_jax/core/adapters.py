"""Small parameters beside a model's own: adapters and LoRA, as leaves of the same tree.

A product looks for them under its own name (`attention/query/lora/...`). Where there are none it
computes what it always did: nothing is switched on but by the parameters themselves, so a compiled
program without them stays as it is, and several sets of them serve one compiled program.

    <product>/lora/{down,up}/kernel, scale        y + scale (x A) B
    <product>/adapter*/{down,up}/{kernel,bias}    y + f(y A + a) B + b, behind the product
    <product>/input_adapter*/...                  the same in front of it, on x
    <norm>/adapter*/...                           behind a norm

The end of the name is f: none, `_relu` or `_gelu_tanh`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

LORA, ADAPTER, INPUT_ADAPTER = "lora", "adapter", "input_adapter"
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "": lambda x: x,
    "_relu": jax.nn.relu,
    "_gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
NAMES = frozenset(
    {LORA} | {f"{place}{end}" for place in (ADAPTER, INPUT_ADAPTER) for end in ACTIVATIONS}
)


def before(module: nn.Module, x: jax.Array) -> jax.Array:
    """What a product reads: x [..., in], or x behind the adapter in front of the product."""
    return _adapted(module, INPUT_ADAPTER, x)


def after(module: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    """What a product gives: y [..., out] of x [..., in], with its LoRA and its adapter."""
    if module.has_variable("params", LORA):
        lora: Any = module.get_variable("params", LORA)
        y = y + low_rank(lora, x, ACTIVATIONS[""]) * lora["scale"].astype(y.dtype)
    return _adapted(module, ADAPTER, y)


def _adapted(module: nn.Module, place: str, x: jax.Array) -> jax.Array:
    for end, activation in ACTIVATIONS.items():
        if module.has_variable("params", place + end):
            x = x + low_rank(module.get_variable("params", place + end), x, activation)
    return x


def low_rank(
    params: Mapping[str, Any], x: jax.Array, activation: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`f(x A + a) B + b`, [..., in] -> [..., out]; a and b may be absent."""
    return _affine(params["up"], activation(_affine(params["down"], x)))


def _affine(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    kernel = params["kernel"].astype(x.dtype)
    y = jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)
    if "bias" not in params:
        return y
    return y + jnp.broadcast_to(params["bias"].astype(y.dtype), y.shape)
