"""Prompts and prefixes that are computed from other parameters while they train, and their shapes.

A model reads vectors in place of tokens (`<token table>/prompt/table`, [p, e]) and keys and values
in front of an attention's own (`<attention>/prefix/{key,value}`, [p, h c]). Both can be the output
of a small network during training; the network is then folded into what it gives.

    prompt/{table, lstm_{0,1}/{forward,backward}/{input,hidden}/{kernel,bias}, hidden, out}
    <stack>/prefix_mlp/<attention>/{table, down, up}

P-tuning: MLP(BiLSTM(table)) (P-tuning: LAMA/p_tuning/prompt_encoder.py; PT-Fewshot/pet/wrapper.py).
Prefix tuning: P = tanh(table D + d) U + u, one network for all layers of a stack and kind of
attention, whose columns are the keys and values of layer 0, then of layer 1...
(PrefixTuning: seq2seq/prefixTuning.py). Layers that share parameters, as in ALBERT, share a prefix.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Float

from atlas_jax.core.types import Array, Params

PROMPT, PREFIX, PREFIX_MLP = "prompt", "prefix", "prefix_mlp"
# How the prompt's vectors are made: the network's hidden width each way over the table's width, or
# 0 without an LSTM.
PROMPT_NETWORKS = {"mlp": 0.0, "lama": 0.5, "fewshot": 1.0}
LSTM_LAYERS = 2
DIRECTIONS = ("forward", "backward")

_LAYER = re.compile(r"(layers|groups)(_\d+)?|shared")


def prompt_rows(prompt: Mapping[str, Any]) -> Float[Array, "p e"]:
    """The vectors of a prompt, [p, e] float32, through its network if it has one."""
    x: jax.Array = prompt["table"]
    for layer in range(LSTM_LAYERS):
        if f"lstm_{layer}" in prompt:
            both = prompt[f"lstm_{layer}"]
            there = _lstm(both["forward"], x)
            back = _lstm(both["backward"], x[::-1])[::-1]
            x = jnp.concatenate([there, back], axis=1)
    if "out" in prompt:
        x = _affine(prompt["out"], jax.nn.relu(_affine(prompt["hidden"], x)))
    return x


def _lstm(params: Mapping[str, Any], x_pd: jax.Array) -> jax.Array:
    """PyTorch's LSTM in one direction: gates i, f, g, o, a bias on either product."""
    inputs_p4h = _affine(params["input"], x_pd)
    zeros_h = jnp.zeros(inputs_p4h.shape[1] // 4, inputs_p4h.dtype)

    def step(carry: tuple[jax.Array, jax.Array], now_4h: jax.Array) -> Any:
        hidden, cell = carry
        i, f, g, o = jnp.split(now_4h + _affine(params["hidden"], hidden), 4)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (hidden, cell), hidden

    return jax.lax.scan(step, (zeros_h, zeros_h), inputs_p4h)[1]


def _affine(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    y = jnp.matmul(x, params["kernel"], precision="highest")
    return y + jnp.broadcast_to(params["bias"], y.shape)


def with_prefixes(params: Params) -> Params:
    """Parameters in which the networks of prefixes are the prefixes that they give.

    A tree without such a network is returned as it is, so its programs do not change.
    """
    if not _has(params, PREFIX_MLP):
        return params
    flat = traverse_util.flatten_dict(params, sep="/")
    kept = {path: leaf for path, leaf in flat.items() if PREFIX_MLP not in path.split("/")}
    for stack, kind, network in _networks(params, ()):
        sites = attentions(list(kept), stack, kind)
        scanned = flat[f"{sites[0]}/query/kernel"].ndim == 3
        count = flat[f"{sites[0]}/query/kernel"].shape[0] if scanned else len(sites)
        table: jax.Array = network["table"]
        both = _affine(network["up"], jnp.tanh(_affine(network["down"], table)))
        both_lsph = both.reshape(len(table), count, 2, -1).transpose(1, 2, 0, 3)  # layers first
        for number, half in enumerate(("key", "value")):
            for layer, site in enumerate(sites):
                own = both_lsph[:, number] if scanned else both_lsph[layer, number]
                kept[f"{site}/{PREFIX}/{half}"] = own
    result: Params = traverse_util.unflatten_dict(kept, sep="/")
    return result


def folded(params: Params) -> Params:
    """Parameters in which every network of a prompt or prefix is what it gives."""
    params = with_prefixes(params)

    def fold(tree: Any, name: str) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        if name == PROMPT and "table" in tree:
            return {"table": prompt_rows(tree)}
        return {key: fold(value, key) for key, value in tree.items()}

    result: Params = fold(params, "")
    return result


def is_soft(path: str) -> bool:
    """Whether a parameter's path is one of a prompt or prefix."""
    return not {PROMPT, PREFIX, PREFIX_MLP}.isdisjoint(path.split("/"))


def prompt_length(params: Params, table: str) -> int:
    """The vectors p of the prompt beside a top-level token table; 0 without one."""
    prompt = params.get(table, {}).get(PROMPT)
    return 0 if prompt is None else int(prompt["table"].shape[0])


def _has(tree: Any, name: str) -> bool:
    return isinstance(tree, Mapping) and (
        name in tree or any(_has(branch, name) for branch in tree.values())
    )


def _networks(tree: Any, above: tuple[str, ...]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Of each prefix network its stack, its kind of attention and its parameters."""
    if not isinstance(tree, Mapping):
        return
    for name, branch in tree.items():
        if name == PREFIX_MLP:
            for kind, network in branch.items():
                yield "/".join(above), kind, network
        else:
            yield from _networks(branch, (*above, name))


def stack_of(site: str) -> str:
    """The path of the stack that an attention belongs to: what is above its first layer."""
    parts = site.split("/")
    return "/".join(parts[: next(i for i, part in enumerate(parts) if _LAYER.fullmatch(part))])


def attentions(paths: list[str], stack: str, kind: str) -> list[str]:
    """The paths of a stack's attentions of a kind, in the order of the layers."""
    sites = {path.removesuffix("/query/kernel") for path in paths if path.endswith("/query/kernel")}
    own = [s for s in sites if s.rpartition("/")[2] == kind and stack_of(s) == stack]
    return sorted(own, key=lambda site: [int(n) for n in re.findall(r"_(\d+)", site)])


Shapes = dict[str, tuple[tuple[int, ...], float]]


def prompt_shapes(length: int, width: int, network: str, spread: float = 0.02) -> Shapes:
    """The leaves of a prompt: path -> shape, and the deviation or limit of its first values.

    A limit is written as a negative number: PyTorch draws its LSTMs and linear layers uniformly up
    to 1 / sqrt(width). Its embeddings have deviation 1, as the table of a network has here. That of
    a prompt without a network has `spread`.
    """
    shapes: Shapes = {"table": ((length, width), 1.0 if network else spread)}
    if not network:
        return shapes
    size, hidden = width, int(width * PROMPT_NETWORKS[network])
    for layer in range(LSTM_LAYERS if hidden else 0):
        for direction in DIRECTIONS:
            at, limit = f"lstm_{layer}/{direction}", -(hidden**-0.5)
            for name, rows in (("input", size), ("hidden", hidden)):
                shapes[f"{at}/{name}/kernel"] = ((rows, 4 * hidden), limit)
                shapes[f"{at}/{name}/bias"] = ((4 * hidden,), limit)
        size = 2 * hidden
    return {**shapes, **_linear("hidden", size, width), **_linear("out", width, width)}


def prefix_network_shapes(length: int, width: int, hidden: int, out: int) -> Shapes:
    """The leaves of a prefix network, as `prompt_shapes` has those of a prompt."""
    table: Shapes = {"table": ((length, width), 1.0)}
    return {**table, **_linear("down", width, hidden), **_linear("up", hidden, out)}


def _linear(name: str, rows: int, columns: int) -> Shapes:
    limit = -(rows**-0.5)
    return {f"{name}/kernel": ((rows, columns), limit), f"{name}/bias": ((columns,), limit)}


def drawn(key: jax.Array, shape: tuple[int, ...], spread: float) -> jax.Array:
    """First values: normal with a deviation, or uniform up to a limit, see `prompt_shapes`."""
    if spread < 0:
        return jax.random.uniform(key, shape, minval=spread, maxval=-spread)
    return spread * jax.random.normal(key, shape)
