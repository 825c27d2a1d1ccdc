"""The two optimisers: one for the reader, one for the retriever, each with its schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from atlas_jax.core.adapters import NAMES
from atlas_jax.training.config import OptimizerConfig


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by step: frozen steps, linear warm-up, then the chosen fall and its end."""
    schedule = _once_moving(config)
    if config.frozen_steps:
        frozen = optax.constant_schedule(0.0)
        schedule = optax.join_schedules([frozen, schedule], [config.frozen_steps])

    def rate(step: Any) -> Any:
        with _optax_promotes():
            return schedule(step)

    return rate


def _optax_promotes() -> Any:
    """Allow optax to mix types, as in a float to the power of a count, where JAX is strict."""
    return jax.numpy_dtype_promotion("standard")


def _once_moving(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by the number of steps since the frozen ones."""
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(config.total_steps - config.frozen_steps - warmup, 1)
    if config.schedule == "linear":
        fall = optax.linear_schedule(peak, config.fall_to * peak, rest)
    elif config.schedule == "constant":
        fall = optax.constant_schedule(peak)
    elif config.cosine_wave == "half":
        fall = optax.cosine_decay_schedule(peak, rest, config.fall_to)
    else:
        fall = _quarter_wave(peak, rest, config.fall_to)
    if warmup == 0:
        return fall
    rise = optax.linear_schedule(config.warmup_from * peak, peak, warmup)
    return optax.join_schedules([rise, fall], [warmup])


def _quarter_wave(peak: float, steps: int, fall_to: float) -> optax.Schedule:
    """From the peak along cos(x), x from 0 to pi / 2, to ``fall_to`` of it."""

    def rate(step: Any) -> Any:
        x = jnp.minimum(step / steps, 1.0) * (jnp.pi / 2)
        return peak * (fall_to + (1 - fall_to) * jnp.cos(x))

    return rate


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Clip, precondition, decay, scale by the schedule; nothing in the frozen steps.

    `update` takes the gradient's global norm as ``grad_norm`` where the caller knows it.
    """
    optimizer = _chained(config)

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> tuple[Any, Any]:
        with _optax_promotes():
            return optimizer.update(updates, state, params, **more)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _chained(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    parts: list[optax.GradientTransformation] = []
    if config.clip_norm > 0:
        parts.append(_clip_by_norm(config.clip_norm))
    if config.kind == "adamw":
        parts.append(optax.scale_by_adam(config.b1, config.b2, config.epsilon))
    elif config.kind == "lamb":
        parts.append(_uncorrected_adam(config.b1, config.b2, config.epsilon))
    else:
        parts += [optax.scale_by_factored_rms(decay_rate=0.8), _clip_by_rms(1.0)]
    if config.weight_decay:
        weights = _products_and_tables if config.kind == "lamb" else decay_mask
        mask = weights if config.decayed == "weights" else None
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=mask))
    if config.kind == "lamb":
        parts.append(_by_layer())
    if config.delta_rate != 1:
        parts.append(_faster_deltas(config.delta_rate))
    parts.append(optax.scale_by_learning_rate(_once_moving(config)))
    if config.frozen_steps == 0:
        return optax.chain(*parts)
    return optax.conditionally_mask(optax.chain(*parts), lambda step: step >= config.frozen_steps)


def _faster_deltas(factor: float) -> optax.GradientTransformation:
    """Adapters, LoRA, prompts and prefixes at a rate of their own: this many times the others'."""

    def one(path: Any, update: jax.Array) -> jax.Array:
        small = NAMES & {key.key for key in path}
        return update * jnp.asarray(factor, update.dtype) if small else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(one, updates))


def _clip_by_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """Scale the gradient down to this global norm where it is longer.

    As `optax.clip_by_global_norm`, but `update` takes the norm as ``grad_norm`` if the caller knows
    it. To compute it here would write the gradients once more and read them twice.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        del params
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        factor = jnp.minimum(1.0, largest / norm)  # 1 for a gradient of zeros
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _uncorrected_adam(b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
    """Adam without the correction of its first steps, which the released LAMB leaves out."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, updates)
        scaled = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mu, nu)
        count = optax.safe_increment(state.count)
        return scaled, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, epsilon).init, update)


def _by_layer() -> optax.GradientTransformation:
    """LAMB's trust ratio: scale each array's update to the length of the array itself.

    As in google-research/albert (arXiv 1904.00962). Norms and biases keep their update, and so does
    an array if it or its update has length 0. Each scanned layer is scaled on its own. `optax.lamb`
    differs: it corrects the bias of the moments.
    """

    def scale(path: Any, update: jax.Array, param: jax.Array, applies: bool) -> jax.Array:
        if not applies:
            return update
        axes = _axes_of_one(path, update)
        length, step = (
            jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))
            for x in (param, update)
        )
        defined = (length > 0) & (step > 0)
        ratio = jnp.where(defined, length / jnp.where(defined, step, 1.0), 1.0)
        return update * ratio.astype(update.dtype)

    def update(updates: Any, params: Any) -> Any:
        applies = _products_and_tables(params)
        return jax.tree_util.tree_map_with_path(scale, updates, params, applies)

    return optax.stateless(update)


def _clip_by_rms(threshold: float) -> optax.GradientTransformation:
    """Clip each array's update to this root mean square; each scanned layer on its own.

    This is Adafactor's update clipping (arXiv 1804.04235, section 6), as in T5X.
    """

    def clip(path: Any, update: jax.Array) -> jax.Array:
        axes = _axes_of_one(path, update)
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=axes, keepdims=True))
        return update / jnp.maximum(1.0, rms / threshold)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(clip, updates))


def _axes_of_one(path: Any, array: jax.Array) -> tuple[int, ...]:
    """All axes of a parameter, but for the axis on which scanned layers are stacked."""
    is_scanned = any(key.key == "layers" for key in path)
    return tuple(range(1 if is_scanned else 0, array.ndim))


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: leaves named ``kernel`` or ``embedding``.

    Chosen by name and not by rank, since scanned layers have one axis more. BERT's position table
    is called an embedding but does not decay.
    """

    def one(path: Any, _: Any) -> bool:
        names = [key.key for key in path]
        return names[-1] in ("kernel", "embedding") and "position_embeddings" not in names

    return jax.tree_util.tree_map_with_path(one, params)


def _products_and_tables(params: Any) -> Any:
    """True for what the released LAMB decays and scales: all but norms and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )
