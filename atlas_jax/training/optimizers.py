"""The two optimisers: one for the reader, one for the retriever, each with its schedule."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """One optimiser. Gin scopes tell the two apart: ``reader/OptimizerConfig.learning_rate``.

    Attributes:
      kind: ``adamw`` or ``adafactor``.
      learning_rate: peak rate, reached after ``warmup_steps`` of linear warm-up.
      warmup_from: share of the peak at which the warm-up begins; at 0 its first step changes
        nothing.
      frozen_steps: so many first steps change neither parameters nor moments; the warm-up
        begins after them.
      schedule: ``linear`` or ``cosine`` fall to ``fall_to`` at ``total_steps``, or ``constant``.
      cosine_wave: of ``cosine``, the ``half`` wave, level at both ends and halfway down at half
        time, or the ``quarter`` wave, which falls ever faster.
      fall_to: share of the peak at which ``linear`` and ``cosine`` end, and stay.
      total_steps: length of the schedule in optimiser steps, frozen ones and warm-up included.
      weight_decay: decoupled decay of what ``decayed`` says.
      decayed: ``weights``, kernels and embeddings but no norms, biases or position tables; or
        ``all`` parameters.
      clip_norm: largest global norm of the gradient; 0 switches clipping off. See
        StepConfig.clip for the gradient that is meant.
    """

    kind: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: bounds.NotNegative = 4e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    cosine_wave: Literal["half", "quarter"] = "half"
    fall_to: bounds.Share = 0.0
    warmup_steps: bounds.AtLeast0 = 0
    warmup_from: bounds.Share = 0.0
    frozen_steps: bounds.AtLeast0 = 0
    total_steps: bounds.AtLeast0 = 1000
    weight_decay: bounds.NotNegative = 0.01
    decayed: Literal["weights", "all"] = "weights"
    clip_norm: bounds.NotNegative = 1.0
    b1: bounds.BelowOne = 0.9
    b2: bounds.BelowOne = 0.999
    epsilon: bounds.NotNegative = 1e-8

    def __post_init__(self) -> None:
        """Check the fields against each other.

        Raises:
          UserError: names the field and what it may be.
        """
        bounds.check(self)
        if not 0 <= self.warmup_steps <= self.total_steps - self.frozen_steps:
            raise UserError(
                f"OptimizerConfig.warmup_steps = {self.warmup_steps} must lie between 0 and "
                f"OptimizerConfig.total_steps - frozen_steps = "
                f"{self.total_steps} - {self.frozen_steps}"
            )


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by step: frozen steps, linear warm-up, then the chosen fall and its end."""
    moving = _once_moving(config)
    if config.frozen_steps == 0:
        return moving
    return optax.join_schedules([optax.constant_schedule(0.0), moving], [config.frozen_steps])


def _once_moving(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by the steps since the frozen ones."""
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
    parts: list[optax.GradientTransformation] = []
    if config.clip_norm > 0:
        parts.append(_clip_by_norm(config.clip_norm))
    if config.kind == "adamw":
        parts.append(optax.scale_by_adam(config.b1, config.b2, config.epsilon))
    else:
        parts += [optax.scale_by_factored_rms(decay_rate=0.8), _clip_by_rms(1.0)]
    if config.weight_decay:
        mask = decay_mask if config.decayed == "weights" else None
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=mask))
    parts.append(optax.scale_by_learning_rate(_once_moving(config)))
    if config.frozen_steps == 0:
        return optax.chain(*parts)
    return optax.conditionally_mask(optax.chain(*parts), lambda step: step >= config.frozen_steps)


def _clip_by_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """Scale the gradient down to this global norm where it is longer.

    As `optax.clip_by_global_norm`, for callers that know the norm: `update` takes it as
    ``grad_norm``. To take it here would write the gradients once more and read them twice.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        del params
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        factor = jnp.minimum(1.0, largest / norm)  # 1 for a gradient of zeros
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _clip_by_rms(threshold: float) -> optax.GradientTransformation:
    """Clip each array's update to this root mean square; of scanned layers each for itself.

    Adafactor's update clipping (arXiv 1804.04235, section 6), as T5X has it for either layout.
    """

    def clip(path: Any, update: jax.Array) -> jax.Array:
        is_scanned = any(key.key == "layers" for key in path)
        axes = tuple(range(1 if is_scanned else 0, update.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=axes, keepdims=True))
        return update / jnp.maximum(1.0, rms / threshold)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(clip, updates))


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: leaves named ``kernel`` or ``embedding``.

    By name and not by rank, so that scanned layers (one axis more) decay alike. BERT's
    position table is an embedding by name only.
    """

    def one(path: Any, _: Any) -> bool:
        names = [key.key for key in path]
        return names[-1] in ("kernel", "embedding") and "position_embeddings" not in names

    return jax.tree_util.tree_map_with_path(one, params)
