"""The training state: parameters, two optimiser states, step and key, sharded as one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atlas_jax.core import deltas, partitioning, trees
from atlas_jax.core.memory import check_fits
from atlas_jax.core.partitioning import Rule
from atlas_jax.core.parts import PARTS
from atlas_jax.core.types import Array, Params
from atlas_jax.models.parameters import Models, RetrieverTraining, abstract_params
from atlas_jax.training.config import StepConfig

QUERY_TOWER = "query_encoder"


@flax.struct.dataclass
class TrainState:
    """Everything a step changes.

    Attributes:
      step: int32 scalar, steps taken, skipped ones included.
      params: ``{"reader": ..., "retriever": ...}``.
      opt_state: one optax state per part, over the trainable parameters alone.
      key: uint32 key data; step ``i`` draws its randomness from ``fold_in(key, i)``.
      skipped: int32 scalar, steps left out because a loss or gradient was not finite.
    """

    step: Array
    params: Params
    opt_state: Any
    key: Array
    skipped: Array


@dataclasses.dataclass(frozen=True)
class Trains:
    """What of both models trains.

    Attributes:
      retriever: ``query_side`` leaves out the passage tower, ``fixed`` the whole retriever.
      patterns: paths that train of what is left, as in `StepConfig.train`; () = of each part its
        adapters or LoRA alone where it has some, and else all of it.
      never: patterns of paths that train in no case.
      binding: what set the patterns, for messages.
    """

    retriever: RetrieverTraining
    patterns: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    binding: str = "StepConfig.train"


def what_trains(config: StepConfig, models: Models) -> Trains:
    """What a run's step changes of its models."""
    never = (f"reader/{path}" for path in models.reader.config.untrained)
    return Trains(config.retriever_training, tuple(config.train), tuple(never))


def split_trainable(params: Params, trains: Trains) -> tuple[Params, Params]:
    """Split into (trainable, frozen) trees; their merge is ``params``.

    Raises:
      UserError: a pattern fits nothing that may train; the nearest paths are named.
    """
    fixed = [*trains.never]
    if trains.retriever == "fixed":
        fixed.append("retriever/*")
    elif trains.retriever == "query_side":
        fixed += [f"retriever/{tower}/*" for tower in params["retriever"] if tower != QUERY_TOWER]
    frozen, moving = trees.split(params, fixed)
    patterns = trains.patterns or _smallest(moving)
    chosen, others = trees.split(moving, patterns, trains.binding)
    return _by_part(chosen), _by_part(trees.joined(frozen, others))


def _smallest(moving: Params) -> list[str]:
    """Patterns of what trains untold: a part's adapters or LoRA, or the whole part."""
    patterns = []
    for part in moving:
        small = deltas.trained(moving[part])
        patterns += [f"{part}/{path}" for path in small] or [f"{part}/*"]
    return patterns


def _by_part(tree: Params) -> Params:
    return {part: tree.get(part, {}) for part in PARTS}


def merge(trainable: Params, frozen: Params) -> Params:
    """Inverse of `split_trainable`."""
    return trees.joined(trainable, frozen)


Optimizers = dict[str, optax.GradientTransformationExtraArgs]


def make_state(
    models: Models,
    params: Params,
    optimizers: Optimizers,
    trains: Trains,
    seed: int,
    mesh: Mesh,
    rules: Sequence[Rule],
) -> TrainState:
    """Wrap parameters into a fresh state, every leaf sharded.

    Raises:
      UserError: the state is larger than this machine's memory.
    """
    make = state_maker(models, optimizers, trains, seed, mesh, rules)
    check_fits(jax.eval_shape(make, params), "parameters and optimiser state")
    state: TrainState = make(params)
    return state


def state_maker(
    models: Models,
    optimizers: Optimizers,
    trains: Trains,
    seed: int,
    mesh: Mesh,
    rules: Sequence[Rule],
) -> Any:
    """The jitted program that wraps parameters into a fresh state.

    Plain ``jit(optimizer.init)`` would replicate the moments. So the shardings of the whole state
    are computed first and passed to jit. The parameters are copied: the step donates its state, and
    the caller may still need them.
    """

    def create(params: Params) -> TrainState:
        return _fresh_state(params, optimizers, trains, seed)

    return jax.jit(create, out_shardings=state_shardings(models, optimizers, trains, mesh, rules))


def abstract_state(
    models: Models,
    optimizers: Optimizers,
    trains: Trains,
    mesh: Mesh,
    rules: Sequence[Rule],
) -> TrainState:
    """Shapes and shardings of the whole state; nothing is allocated."""
    shaping = (optimizers, trains)
    shapes = jax.eval_shape(
        lambda params: _fresh_state(params, *shaping, seed=0), meta.unbox(abstract_params(models))
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(models, *shaping, mesh, rules),
    )


def _fresh_state(params: Params, optimizers: Optimizers, trains: Trains, seed: int) -> TrainState:
    trainable, _ = split_trainable(params, trains)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state={part: optimizers[part].init(trainable[part]) for part in PARTS},
        key=jax.random.key_data(jax.random.key(seed)),
        skipped=jnp.zeros((), jnp.int32),
    )


def state_shardings(
    models: Models,
    optimizers: Optimizers,
    trains: Trains,
    mesh: Mesh,
    rules: Sequence[Rule],
) -> TrainState:
    """The sharding of each leaf of the state; a moment has the sharding of its parameter."""
    boxed = abstract_params(models)
    shapes = meta.unbox(boxed)
    specs = partitioning.param_shardings(boxed, mesh, rules)
    trainable_shapes, _ = split_trainable(shapes, trains)
    trainable_specs, _ = split_trainable(specs, trains)
    everywhere = partitioning.replicated(mesh)
    opt_state = {
        part: moment_shardings(
            jax.eval_shape(optimizers[part].init, trainable_shapes[part]),
            trainable_shapes[part],
            trainable_specs[part],
            everywhere,
        )
        for part in PARTS
    }
    return TrainState(
        step=everywhere, params=specs, opt_state=opt_state, key=everywhere, skipped=everywhere
    )


def moment_shardings(
    opt_shapes: Any, shapes: Params, specs: Params, everywhere: NamedSharding
) -> Any:
    """Give each optimiser leaf the spec of the parameter whose path its own path ends with.

    A factored moment (Adafactor's ``v_row``, ``v_col``) lacks one axis of its parameter; so does
    its spec. Leaves of other shapes are replicated.
    """
    by_path = {
        _names(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(specs), strict=True
        )
    }

    def one(path: Any, leaf: Any) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            if names[start:] not in by_path:
                continue
            shape, sharding = by_path[names[start:]]
            if leaf.shape == shape:
                return sharding
            dropped = _factored_axis(shape, "v_row" in names[:start])
            if leaf.shape == tuple(np.delete(shape, dropped)):
                kept = list(sharding.spec) + [None] * (len(shape) - len(sharding.spec))
                del kept[dropped]
                return NamedSharding(sharding.mesh, PartitionSpec(*kept))
        return everywhere

    return jax.tree_util.tree_map_with_path(one, opt_shapes)


def _factored_axis(shape: tuple[int, ...], is_row: bool) -> int:
    """The axis optax averages away: the largest for ``v_row``, the second for ``v_col``."""
    if len(shape) < 2:
        return 0
    order = np.argsort(shape)
    return int(order[-1] if is_row else order[-2])


def _names(path: Any) -> tuple[str, ...]:
    return tuple(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )
