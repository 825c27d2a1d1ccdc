"""Small parameters beside a model's own: adapters, LoRA, prompts, as leaves of the same tree.

A product looks for them under its own name (`attention/query/lora/...`). Where there are none it
computes what it always did: nothing is switched on but by the parameters themselves, so a compiled
program without them stays as it is, and several sets of them serve one compiled program.

    <product>/lora/{down,up}/kernel, scale        y + scale (x A) B
    <product>/adapter*/{down,up}/{kernel,bias}    y + f(y A + a) B + b, behind the product
    <product>/input_adapter*/...                  the same in front of it, on x
    <norm>/adapter*/...                           behind a norm
    <token table>/prompt/...                      vectors of the ids behind the table's own
    <attention>/prefix/{key,value}                keys and values in front of its own

The end of the name is f: none, `_relu` or `_gelu_tanh`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Integer

from atlas_jax.core.soft_prompts import PREFIX, PREFIX_MLP, PROMPT, prompt_rows, with_prefixes
from atlas_jax.core.types import Array

LORA, ADAPTER, INPUT_ADAPTER = "lora", "adapter", "input_adapter"
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "": lambda x: x,
    "_relu": jax.nn.relu,
    "_gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
NAMES = frozenset(
    {LORA, PROMPT, PREFIX, PREFIX_MLP}
    | {f"{place}{end}" for place in (ADAPTER, INPUT_ADAPTER) for end in ACTIVATIONS}
)


def before(module: nn.Module, x: Float[Array, "*n i"]) -> Float[Array, "*n i"]:
    """The input x [..., in] of a matrix product, passed through its adapter if it has one."""
    return _adapted(module, INPUT_ADAPTER, x)


def after(
    module: nn.Module, x: Float[Array, "*n i"], y: Float[Array, "*n o"]
) -> Float[Array, "*n o"]:
    """The output y [..., out] of a matrix product of x [..., in], with its LoRA and adapter."""
    if module.has_variable("params", LORA):
        lora: Any = module.get_variable("params", LORA)
        y = y + low_rank(lora, x, ACTIVATIONS[""]) * lora["scale"].astype(y.dtype)
    return _adapted(module, ADAPTER, y)


def looked_up(
    module: nn.Module, table_vd: Float[Array, "v d"], ids: Integer[Array, "*n"]
) -> Float[Array, "*n d"]:
    """Rows [..., d] of a token table; ids from v on are those of its prompt, if it has one."""
    if not module.has_variable("params", PROMPT):
        return jnp.take(table_vd, ids, axis=0)
    v = table_vd.shape[0]
    soft_pd = prompt_rows(module.get_variable("params", PROMPT)).astype(table_vd.dtype)
    words = jnp.take(table_vd, jnp.minimum(ids, v - 1), axis=0)
    soft = jnp.take(soft_pd, jnp.clip(ids - v, 0, len(soft_pd) - 1), axis=0)
    return jnp.where((ids >= v)[..., None], soft, words)


def prefix_length(module: nn.Module) -> int:
    """The keys p that an attention has of its own in front of what it reads; 0 without a prefix."""
    if not module.has_variable("params", PREFIX):
        return 0
    prefix: Any = module.get_variable("params", PREFIX)
    return int(prefix["key"].shape[0])


def behind_prefix(
    module: nn.Module, half: str, x_nhsc: Float[Array, "n h s c"]
) -> Float[Array, "n h r c"]:
    """An attention's keys or values [n, h, s, c] behind those of its prefix, [n, h, p + s, c].

    Args:
      module: the attention.
      half: 'key' or 'value'.
      x_nhsc: as the attention computes them; given back as they are without a prefix.
    """
    if not module.has_variable("params", PREFIX):
        return x_nhsc
    n, h, _, c = x_nhsc.shape
    prefix: Any = module.get_variable("params", PREFIX)
    own_phc = prefix[half].astype(x_nhsc.dtype).reshape(-1, h, c)  # heads apart
    own_nhpc = jnp.broadcast_to(own_phc.transpose(1, 0, 2), (n, h, len(own_phc), c))
    return jnp.concatenate([own_nhpc, x_nhsc], axis=2)


def beside_prefix(module: nn.Module, bias: Float[Array, "*n s"]) -> Float[Array, "*n r"]:
    """A bias of an attention's keys [..., s], 0 for those of its prefix, [..., p + s]."""
    p = prefix_length(module)
    return jnp.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(p, 0)]) if p else bias


def _adapted(module: nn.Module, place: str, x: jax.Array) -> jax.Array:
    for end, activation in ACTIVATIONS.items():
        if module.has_variable("params", place + end):
            x = x + low_rank(module.get_variable("params", place + end), x, activation)
    return x


def low_rank(
    params: Mapping[str, Any],
    x: Float[Array, "*n i"],
    activation: Callable[[jax.Array], jax.Array],
) -> Float[Array, "*n o"]:
    """`f(x A + a) B + b`, [..., in] -> [..., out]; a and b may be absent."""
    return _affine(params["up"], activation(_affine(params["down"], x)))


def _affine(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    kernel = params["kernel"].astype(x.dtype)
    y = jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)
    if "bias" not in params:
        return y
    return y + jnp.broadcast_to(params["bias"].astype(y.dtype), y.shape)


class WithPrefixes(nn.Module):
    """A model whose prefixes may be the output of networks (`soft_prompts.with_prefixes`)."""

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.apply`; the layers get the prefixes that the networks give."""
        params = with_prefixes(variables["params"])
        if params is not variables["params"]:
            variables = {**variables, "params": params}
        return super().apply(variables, *args, **kwargs)
