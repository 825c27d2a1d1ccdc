"""Both models as one value, and their parameters: shapes, shardings, first values."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.sharding import Mesh

from atlas_jax.core import partitioning
from atlas_jax.core.deltas import DeltaConfig, new_delta, split_delta, with_delta
from atlas_jax.core.memory import check_fits
from atlas_jax.core.partitioning import Rule
from atlas_jax.core.parts import PARTS
from atlas_jax.core.types import Params
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.dual_encoder import DualEncoder, untie

RetrieverTraining = Literal["joint", "query_side", "fixed"]


@dataclasses.dataclass(frozen=True)
class Models:
    """The two modules; hashable, so that compiled steps can be cached on them.

    Attributes:
      deltas: (path, adapters or LoRA) of what has some beside its own parameters: "reader",
        "retriever", or a single tower such as "retriever/query_encoder".
    """

    reader: T5
    retriever: DualEncoder
    deltas: tuple[tuple[str, DeltaConfig], ...] = ()


def abstract_params(models: Models) -> Params:
    """Shapes of all parameters, boxed with their logical axes; nothing is allocated."""
    return jax.tree.map(lambda leaf: leaf, _traced(models))  # the caller may change its dicts


@functools.lru_cache(maxsize=16)
def _traced(models: Models) -> Params:
    """`abstract_params`, traced once: a run asks for them half a dozen times."""
    return jax.eval_shape(lambda: _init_boxed(models, jax.random.key(0)))


def init_params(
    models: Models,
    seed: int,
    mesh: Mesh,
    rules: Sequence[Rule],
    parts: Sequence[str] = PARTS,
    one_tower: bool = False,
) -> Params:
    """Draw fresh parameters, each created directly on the devices that hold it.

    Args:
      parts: the models that are wanted; a part's numbers do not depend on the others.
      one_tower: both towers of an untied retriever begin as one that is drawn for a tied one.

    Raises:
      UserError: they are larger than this machine's memory.
    """
    shapes = meta.unbox(abstract_params(models))
    check_fits({part: shapes[part] for part in parts}, "the parameters")
    return _init(models, mesh, tuple(rules), tuple(parts), one_tower)(jax.random.key(seed))


@functools.lru_cache(maxsize=16)
def _init(
    models: Models, mesh: Mesh, rules: tuple[Rule, ...], parts: tuple[str, ...], one_tower: bool
) -> Callable[[jax.Array], Params]:
    """The compiled `init_params`, by key."""
    drawn = models
    if one_tower:
        tied = dataclasses.replace(models.retriever.config, tied=True)
        drawn = Models(models.reader, DualEncoder(tied))

    def init(key: jax.Array) -> Params:
        params = meta.unbox(_init_boxed(drawn, key))
        if not models.retriever.config.tied:
            params["retriever"] = untie(params["retriever"])
        return {part: params[part] for part in parts}

    shardings = partitioning.param_shardings(abstract_params(models), mesh, rules)
    return jax.jit(init, out_shardings={part: shardings[part] for part in parts})


def init_deltas(models: Models, seed: int, mesh: Mesh, rules: Sequence[Rule]) -> Params:
    """By part, fresh adapters and LoRA alone, as `init_params` draws them."""

    def small(params: Params) -> Params:
        return {part: split_delta(params[part])[1] for part in PARTS}

    specs = small(partitioning.param_shardings(abstract_params(models), mesh, rules))
    init = jax.jit(lambda key: small(meta.unbox(_init_boxed(models, key))), out_shardings=specs)
    return init(jax.random.key(seed))


def _init_boxed(models: Models, key: jax.Array) -> Params:
    reader_key, retriever_key = jax.random.split(key)
    tokens = jnp.ones((1, 4), jnp.int32)

    def both_stacks(reader: T5) -> Any:
        states = reader.encode(tokens, deterministic=True)
        copied = {"source_tokens_bs": tokens} if reader.config.pointer else {}
        return reader.decode(states, tokens > 0, tokens, deterministic=True, **copied)

    def both_towers(retriever: DualEncoder) -> Any:
        return retriever.embed_query(tokens, True), retriever.embed_passage(tokens, True)

    params = {
        "reader": nn.init(both_stacks, models.reader)(reader_key)["params"],
        "retriever": nn.init(both_towers, models.retriever)(retriever_key)["params"],
    }
    for path, config in models.deltas:
        part, *tower = path.split("/")
        place = params[part][tower[0]] if tower else params[part]
        delta = new_delta(place, config, jax.random.fold_in(key, PARTS.index(part)))
        params[part] = with_delta(params[part], {tower[0]: delta} if tower else delta)
    return params
