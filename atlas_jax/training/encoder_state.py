"""The state of an encoder in training, and its step. A run may train some parameters alone."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.core import meta
from jax.sharding import Mesh

from atlas_jax.core import deltas, multihost, partitioning, soft_prompts, trees
from atlas_jax.core.partitioning import Rule
from atlas_jax.core.types import Array, Params
from atlas_jax.training.state import moment_shardings

Metrics = dict[str, Array]
# (parameters, key for dropout and the like, *batch) -> (mean loss, metrics).
LossFn = Callable[..., tuple[Array, Metrics]]
State = TypeVar("State")

_HOULSBY = "/adapter_gelu_tanh/"


@flax.struct.dataclass
class EncoderState:
    """Everything a step changes.

    Attributes:
      step: int32 scalar, steps taken, skipped ones included.
      params: the whole tree, what does not train included.
      opt_state: optax state over what trains alone.
      key: uint32 key data; step `i` draws its randomness from `fold_in(key, i)`.
      skipped: int32 scalar, steps left out because loss or gradient was not finite.
    """

    step: Array
    params: Params
    opt_state: Any
    key: Array
    skipped: Array


def trained_patterns(params: Params, told: Sequence[str], heads: Sequence[str]) -> tuple[str, ...]:
    """Patterns of the paths that train.

    Args:
      params: {"encoder": ..., and heads by name}.
      told: the patterns of a run; () = adapters, LoRA, prompt or prefix where there are some, with
        Houlsby's the layer norms, too, or else the encoder; and the heads, but beside a prompt or
        prefix the MLM head stays as it is.
      heads: names of the heads that the loss uses; another does not train untold.
    """
    if told:
        return tuple(told)
    small = deltas.trained(params)
    norms = ("encoder/*layer_norm*",) if any(_HOULSBY in path for path in small) else ()
    if any(soft_prompts.is_soft(path) for path in small):
        heads = [head for head in heads if head != "mlm"]
    return (*(small or ("encoder/*",)), *norms, *(f"{head}/*" for head in heads))


def fresh_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    patterns: Sequence[str],
    seed: int,
    binding: str = "",
) -> EncoderState:
    """Wrap parameters into a state of step 0.

    Raises:
      UserError: a pattern fits no parameter; `binding` is named.
    """
    moving, _ = trees.split(params, patterns, binding)
    return EncoderState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(moving),
        key=jax.random.key_data(jax.random.key(seed)),
        skipped=jnp.zeros((), jnp.int32),
    )


def begun(fresh: Callable[[Params], State], params: Params, where: Any) -> State:
    """A fresh state of parameters, each of its leaves made in its shards.

    Args:
      fresh: see `fresh_state`.
      params: on the host, or in the shards that `where` says.
      where: the state's shapes or shardings.
    """
    shardings = jax.tree.map(lambda leaf: getattr(leaf, "sharding", leaf), where)
    placed = multihost.place(params, shardings.params)
    state: State = jax.jit(fresh, out_shardings=shardings)(placed)
    return state


def state_shardings(
    boxed: Params,
    optimizer: optax.GradientTransformation,
    patterns: Sequence[str],
    mesh: Mesh,
    rules: Sequence[Rule],
) -> EncoderState:
    """The sharding of each leaf of the state; a moment has the sharding of its parameter.

    Args:
      boxed: shapes of the parameters with their logical axes.
    """
    shapes, specs = meta.unbox(boxed), partitioning.param_shardings(boxed, mesh, rules)
    moving, _ = trees.split(shapes, patterns)
    places, _ = trees.split(specs, patterns)
    everywhere = partitioning.replicated(mesh)
    opt_state = moment_shardings(jax.eval_shape(optimizer.init, moving), moving, places, everywhere)
    return EncoderState(everywhere, specs, opt_state, everywhere, everywhere)


def abstract(make: Callable[..., Any], shardings: Any, *shapes: Any) -> Any:
    """Shapes and shardings of the state that `make` gives of `shapes`; nothing is allocated."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(make, *shapes),
        shardings,
    )


def make_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, patterns: Sequence[str]
) -> Callable[..., tuple[EncoderState, Metrics]]:
    """Build `step(state, *batch) -> (state, metrics)`, for the caller to jit.

    Gradients and moments exist for what trains alone. A step whose loss or gradient is not finite
    changes neither parameters nor moments and is counted in `state.skipped`.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step(state: EncoderState, *batch: Any) -> tuple[EncoderState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        moving, frozen = trees.split(state.params, patterns)

        def loss(moving: Params) -> tuple[Array, Metrics]:
            return loss_fn(trees.joined(moving, frozen), key, *batch)

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(moving)
        moved, opt_state, norm, finite = updated(optimizer, value, grads, state.opt_state, moving)
        new = EncoderState(
            step=state.step + 1,
            params=trees.joined(moved, frozen),
            opt_state=opt_state,
            key=state.key,
            skipped=state.skipped + jnp.where(finite, 0, 1),
        )
        return new, {"loss": value, **metrics, "grad_norm": norm, "skipped": new.skipped}

    return step


def updated(
    optimizer: optax.GradientTransformationExtraArgs,
    loss: Array,
    grads: Params,
    opt_state: Any,
    moving: Params,
    wanted: Array | bool = True,
) -> tuple[Params, Any, Array, Array]:
    """One update of what trains; none where loss or gradient is not finite.

    Args:
      wanted: bool scalar; False leaves everything as it is, too.

    Returns:
      New parameters and moments, the gradient's norm, and whether loss and gradient were finite.
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss + norm)
    changes, after = optimizer.update(grads, opt_state, moving, grad_norm=norm)
    new, old = (optax.apply_updates(moving, changes), after), (moving, opt_state)
    takes = jnp.logical_and(finite, wanted)
    moved, opt_state = jax.tree.map(lambda a, b: jnp.where(takes, a, b), new, old)
    return moved, opt_state, norm, finite
