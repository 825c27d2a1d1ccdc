"""Schedules, clipping and what weight decay touches."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.models.parameters import _init_boxed
from atlas_jax.reader.scanned import stack_layers
from atlas_jax.training.config import OptimizerConfig
from atlas_jax.training.optimizers import (
    decay_mask,
    make_optimizer,
    make_schedule,
)
from tests.training.models import tiny_models


def rates(*steps: int, **config: object) -> list[float]:
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, **config))  # type: ignore[arg-type]
    return [float(schedule(step)) for step in steps]


def test_linear_warms_up_and_falls_to_zero_and_stays() -> None:
    got = rates(0, 5, 10, 55, 100, 150, schedule="linear", warmup_steps=10, total_steps=100)
    np.testing.assert_allclose(got, [0, 0.5, 1, 0.5, 0, 0], atol=1e-6)


def test_cosine_never_goes_below_zero() -> None:
    got = rates(10, 55, 100, 150, schedule="cosine", warmup_steps=10, total_steps=100)
    np.testing.assert_allclose(got, [1, 0.5, 0, 0], atol=1e-6)


def test_a_quarter_wave_is_high_for_longer() -> None:
    got = rates(
        10, 55, 100, 150, schedule="cosine", cosine_wave="quarter", warmup_steps=10, total_steps=100
    )
    np.testing.assert_allclose(got, [1, math.sqrt(0.5), 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("wave", "half_time"),
    [({"schedule": "linear"}, 0.55), ({"schedule": "cosine"}, 0.55),
     ({"schedule": "cosine", "cosine_wave": "quarter"}, 0.1 + 0.9 * math.sqrt(0.5))],
)  # fmt: skip
def test_a_schedule_ends_at_the_share_it_falls_to(wave: dict[str, str], half_time: float) -> None:
    got = rates(10, 55, 100, 150, fall_to=0.1, warmup_steps=10, total_steps=100, **wave)
    np.testing.assert_allclose(got, [1, half_time, 0.1, 0.1], atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_warm_up_begins_at_its_share_of_the_peak(schedule: str) -> None:
    got = rates(0, 1, 2, 4, warmup_from=0.2, warmup_steps=4, total_steps=9, schedule=schedule)
    np.testing.assert_allclose(got, [0.2, 0.4, 0.6, 1], atol=1e-6)


def test_constant_stays() -> None:
    assert rates(0, 99, 1000, schedule="constant") == [1, 1, 1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "adam"}, "OptimizerConfig.kind = 'adam'"),
        ({"schedule": "step"}, "OptimizerConfig.schedule = 'step'"),
        ({"cosine_wave": "full"}, "OptimizerConfig.cosine_wave = 'full'"),
        ({"decayed": "some"}, "OptimizerConfig.decayed = 'some'"),
        ({"fall_to": 1.5}, "OptimizerConfig.fall_to = 1.5"),
        ({"warmup_from": -0.1}, "OptimizerConfig.warmup_from = -0.1"),
        ({"warmup_steps": 20, "total_steps": 10}, "warmup_steps = 20"),
        ({"warmup_steps": 5, "frozen_steps": 6, "total_steps": 10}, "frozen_steps = 10 - 6"),
    ],
)
def test_bad_settings_are_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**config)  # type: ignore[arg-type]


def test_gradients_are_clipped_by_their_global_norm() -> None:
    config = OptimizerConfig(kind="adafactor", clip_norm=0.0, weight_decay=0.0)
    assert make_optimizer(config).init({"kernel": jnp.ones(3)}) is not None
    sgd_like = OptimizerConfig(
        learning_rate=1.0, schedule="constant", weight_decay=0.0, clip_norm=1.0, b1=0.0, epsilon=1e6
    )  # with so large an epsilon Adam only scales
    optimizer = make_optimizer(sgd_like)
    params = {"kernel": jnp.zeros(2)}
    updates = [
        optimizer.update({"kernel": jnp.array([3.0, 4.0]) * scale}, optimizer.init(params), params)
        for scale in (1.0, 10.0)
    ]
    np.testing.assert_allclose(updates[0][0]["kernel"], updates[1][0]["kernel"], rtol=1e-5)


@pytest.mark.parametrize("length", [0.0, 0.5, 1.0, 20.0])
@pytest.mark.parametrize("frozen_steps", [0, 1])
def test_a_norm_that_is_given_clips_like_the_one_taken(length: float, frozen_steps: int) -> None:
    """Adam's first moment after one step is the gradient as it was clipped, but for b1 = 0.9."""
    config = OptimizerConfig(frozen_steps=frozen_steps, warmup_steps=0)
    optimizer = make_optimizer(config)
    direction = np.array([3.0, 4.0], np.float32) / 5
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    gradient = {"a": length * 0.6 * direction, "b": length * 0.8 * direction}
    moments = []
    for given in ({}, {"grad_norm": jnp.float32(length)}):
        state = optimizer.init(params)
        for _ in range(1 + frozen_steps):
            _, state = optimizer.update(gradient, state, params, **given)
        moments.append([leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2,)])
    mu_a = moments[0][0]
    clipped, _ = optax.clip_by_global_norm(1.0).update(gradient, optax.EmptyState())
    np.testing.assert_allclose(mu_a, 0.1 * clipped["a"], rtol=1e-6)
    for taken, given in zip(*moments, strict=True):
        np.testing.assert_allclose(given, taken, rtol=1e-6)


def test_decay_leaves_norms_biases_and_position_tables_alone() -> None:
    shapes = jax.eval_shape(lambda: _init_boxed(tiny_models(), jax.random.key(0)))
    params = jax.tree.map(
        lambda box: box.value if hasattr(box, "value") else box,
        shapes,
        is_leaf=lambda x: hasattr(x, "value"),
    )
    flat = {
        "/".join(key.key for key in path): decays
        for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params))
    }
    kept = {name.split("/")[-1] if "position" not in name else "position" for name in flat
            if not flat[name]}  # fmt: skip
    assert kept == {"scale", "bias", "rel_embedding", "position"}
    assert flat["reader/token_embedder/embedding"]


@pytest.mark.parametrize(("decayed", "scale"), [("weights", 1.0), ("all", 0.95)])
def test_decay_may_take_everything(decayed: Any, scale: float) -> None:
    """Without a gradient a parameter loses learning_rate * weight_decay of itself."""
    config = OptimizerConfig(
        learning_rate=0.5, schedule="constant", weight_decay=0.1, decayed=decayed
    )
    params = {"kernel": jnp.ones(3), "scale": jnp.ones(3)}
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["kernel"], 0.95, rtol=1e-6)
    np.testing.assert_allclose(after["scale"], scale, rtol=1e-6)


def test_frozen_steps_change_neither_parameters_nor_moments() -> None:
    assert rates(
        0, 3, 4, 5, 6, 8, 10, schedule="linear", frozen_steps=4, warmup_steps=2, total_steps=10
    ) == [0, 0, 0, 0.5, 1, 0.5, 0]
    config = OptimizerConfig(learning_rate=0.5, schedule="linear", total_steps=8, warmup_steps=1)
    params = {"kernel": jnp.ones((2, 2))}
    grads = [{"kernel": jnp.full((2, 2), 0.1 * i)} for i in range(1, 8)]

    def run(tx: optax.GradientTransformation, grads: list) -> list:
        state, at, path = tx.init(params), params, []
        for grad in grads:
            updates, state = tx.update(grad, state, at)
            at = optax.apply_updates(at, updates)
            path.append(np.asarray(at["kernel"])[0, 0])
        return path

    late = dataclasses.replace(config, frozen_steps=3, total_steps=11)
    frozen = run(make_optimizer(late), grads)
    assert frozen[:3] == [1, 1, 1]
    # From there on it is the run that has just begun.
    assert frozen[3:] == run(make_optimizer(config), grads[3:])
    assert frozen[-1] < 1


def test_adafactor_takes_the_same_step_with_scanned_layers() -> None:
    """Gradients whose size differs by layer: each layer is clipped for itself."""
    optimizer = make_optimizer(OptimizerConfig(kind="adafactor", schedule="constant"))
    rng = np.random.default_rng(0)

    def tree(size: float) -> dict[str, np.ndarray]:
        shapes = {"kernel": (130, 140), "scale": (5,)}
        return {n: size * rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}

    def stacks(*sizes: float) -> dict[str, dict[str, dict[str, np.ndarray]]]:
        layers = {f"layers_{i}": tree(size) for i, size in enumerate(sizes)}
        return {stack: dict(layers) for stack in ("encoder", "decoder")}

    params, states, updates = stacks(1, 1, 1), {}, {}
    forms = {"unrolled": lambda x: x, "scanned": stack_layers}
    for name, form in forms.items():
        states[name] = optimizer.init(form(params))
    for sizes in ((1.0, 1e-3, 1.0), (1e-3, 100.0, 10.0)):
        gradients = stacks(*sizes)
        for name, form in forms.items():
            updates[name], states[name] = optimizer.update(
                form(gradients), states[name], form(params)
            )
    expected = stack_layers(updates["unrolled"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9),
        updates["scanned"], expected,
    )  # fmt: skip
    kernels = np.asarray(updates["scanned"]["encoder"]["layers"]["kernel"])
    rms = np.sqrt((kernels**2).mean(axis=(1, 2))) / OptimizerConfig().learning_rate
    assert rms.min() < 0.1 and rms.max() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", ["adamw", "lamb", "adafactor"])
def test_small_parameters_may_have_a_rate_of_their_own(kind: Any) -> None:
    """As with an optimiser of their own, whose rate and decay are ten times the others'."""
    rng = np.random.default_rng(3)

    def tree() -> Any:
        leaf = lambda: jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)  # noqa: E731
        return {"query": {"kernel": leaf(), "lora": {"down": {"kernel": leaf()}}},
                "table": {"prompt": {"table": leaf()}}}  # fmt: skip

    params, gradients = tree(), tree()
    config = OptimizerConfig(kind, 1e-3, total_steps=4, clip_norm=0.0, weight_decay=0.1)
    changes = []
    for told in (config, dataclasses.replace(config, delta_rate=10.0)):
        optimizer = make_optimizer(told)
        changes.append(optimizer.update(gradients, optimizer.init(params), params)[0])
    plain, faster = changes
    for name in (("query", "lora", "down", "kernel"), ("table", "prompt", "table")):
        one, other = plain, faster
        for part in name:
            one, other = one[part], other[part]
        np.testing.assert_allclose(other, 10 * one, rtol=1e-6)
    np.testing.assert_array_equal(faster["query"]["kernel"], plain["query"]["kernel"])


def test_lamb_is_the_released_one() -> None:
    """Against its update written out in NumPy: no bias correction, ratios by array."""
    rate, decay, b1, b2, epsilon = 0.02, 0.1, 0.9, 0.999, 1e-6
    optimizer = make_optimizer(
        OptimizerConfig(
            kind="lamb",
            learning_rate=rate,
            schedule="constant",
            weight_decay=decay,
            clip_norm=1.0,
            epsilon=epsilon,
        )  # fmt: skip
    )
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "embedding": (5, 2), "bias": (4,), "scale": (4,)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    params["zero"] = np.zeros((2, 2))
    tree = {"a": {n: params[n] for n in shapes}, "b": {"kernel": params["zero"]}}
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    state = optimizer.init(tree)
    moments = {name: (np.zeros_like(p), np.zeros_like(p)) for name, p in params.items()}
    for _ in range(4):
        gradients = {name: rng.normal(size=p.shape) for name, p in params.items()}
        length = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        for name, p in params.items():
            g = gradients[name] / max(length, 1.0)
            m, v = moments[name]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            moments[name] = m, v
            step = m / (np.sqrt(v) + epsilon)
            if name not in ("bias", "scale"):
                step = step + decay * p
                size = np.linalg.norm(p)
                step = step * (size / np.linalg.norm(step) if size > 0 else 1.0)
            params[name] = p - rate * step
        grads = {"a": {n: gradients[n] for n in shapes}, "b": {"kernel": gradients["zero"]}}
        grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads)
        updates, state = optimizer.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
    for name in shapes:
        np.testing.assert_allclose(tree["a"][name], params[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tree["b"]["kernel"], params["zero"], rtol=1e-5, atol=1e-6)


def test_lamb_scales_each_of_scanned_layers_for_itself() -> None:
    config = OptimizerConfig(kind="lamb", schedule="constant", clip_norm=0.0)
    optimizer = make_optimizer(config)
    layers = [np.full((2, 3), 0.5 * (i + 1), np.float32) for i in range(2)]
    gradients = [np.linspace(-1, i + 1, 6, dtype=np.float32).reshape(2, 3) for i in range(2)]
    apart = [
        optimizer.update({"kernel": g}, optimizer.init({"kernel": p}), {"kernel": p})[0]["kernel"]
        for p, g in zip(layers, gradients, strict=True)
    ]
    params = {"layers": {"kernel": np.stack(layers)}}
    grads = {"layers": {"kernel": np.stack(gradients)}}
    together, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(together["layers"]["kernel"], np.stack(apart), rtol=1e-6)
