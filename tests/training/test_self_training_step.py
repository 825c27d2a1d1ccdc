"""LiST's weights against their definition, and its loop on a toy with a known answer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from atlas_jax.training.config import OptimizerConfig
from atlas_jax.training.optimizers import make_optimizer
from atlas_jax.training.self_training_step import (
    KD,
    META,
    TEACHER,
    TUNE,
    Parts,
    Schedule,
    SelfTrainingState,
    distillation,
    fresh_state,
    make_self_training_step,
    row_weights,
)

Rows = dict[str, Any]


def logits_of(params: Any, rows: Rows, key: jax.Array | None = None) -> jax.Array:
    """A layer of tanh and a product; `scale` is frozen."""
    x = jnp.tanh(jnp.matmul(rows["x"], params["down"]["kernel"]) * params["scale"])
    return jnp.matmul(x, params["up"]["kernel"])


def drawn(key: jax.Array, dtype: Any = jnp.float32) -> Any:
    down, up = jax.random.split(key)
    return {
        "down": {"kernel": 0.5 * jax.random.normal(down, (2, 8), dtype)},
        "up": {"kernel": 0.1 * jax.random.normal(up, (8, 2), dtype)},
    }


def test_the_schedule_is_that_of_the_released_code() -> None:
    lists = Schedule(teacher=400, rounds=6, kd=600, meta=400, tune=400)
    assert (lists.round, lists.total) == (1400, 8800)
    places = {0: (TEACHER, -1, 0), 399: (TEACHER, -1, 399), 400: (KD, 0, 0), 1000: (KD, 0, 600),
              1001: (META, 0, 601), 1399: (META, 0, 999), 1400: (TUNE, 0, 1000),
              1799: (TUNE, 0, 1399), 1800: (KD, 1, 0), 8799: (TUNE, 5, 1399)}  # fmt: skip
    for step, place in places.items():
        assert tuple(int(x) for x in lists.place(step)) == place
    without = Schedule(teacher=0, rounds=1, kd=2, meta=0, tune=1)
    assert [int(without.place(step)[0]) for step in range(3)] == [KD, KD, TUNE]


def test_weights_are_those_of_differentiating_through_the_imagined_step() -> None:
    """And of the formula, in float64 to 1e-9; what opposes the labelled rows gets 0."""
    with jax.enable_x64(True):
        params = drawn(jax.random.key(0), jnp.float64)
        rng = np.random.default_rng(0)
        x_u2, x_l2 = jnp.asarray(rng.normal(size=(6, 2))), jnp.asarray(rng.normal(size=(4, 2)))
        labels = jnp.asarray([0, 1, 1, 0])
        told = jnp.asarray(rng.normal(size=(6, 2)))
        eta = 0.3

        def logits(moving: Any, x: jax.Array) -> jax.Array:
            return logits_of({**moving, "scale": jnp.asarray(1.5)}, {"x": x})

        def losses(moving: Any) -> jax.Array:
            return distillation(told, logits(moving, x_u2))

        def labelled(moving: Any) -> jax.Array:
            found = logits(moving, x_l2)
            return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()

        def after(e_u: jax.Array) -> jax.Array:
            grads = jax.grad(lambda p: jnp.sum(e_u * losses(p)))(params)
            return labelled(jax.tree.map(lambda p, g: p - eta * g, params, grads))

        raw_u = -jax.grad(after)(jnp.zeros(6))
        useful_u = jnp.maximum(raw_u, 0.0)
        found_u = row_weights(losses, labelled, params, eta)
        np.testing.assert_allclose(found_u, useful_u / (useful_u.sum() + 1e-6), atol=1e-9)
        assert (np.asarray(raw_u) < 0).any()
        assert np.all(np.asarray(found_u)[np.asarray(raw_u) < 0] == 0.0)
        tiny_u = row_weights(losses, labelled, params, 1e-7)
        assert 0.01 < float(tiny_u.sum()) < 0.9  # the 1e-6 matters


def test_a_flipped_pseudo_label_weighs_less_than_a_right_one() -> None:
    params = {**drawn(jax.random.key(3)), "scale": jnp.ones(())}
    moving = {name: params[name] for name in ("down", "up")}
    x = jnp.asarray([[1.0, 0.2], [1.0, -0.2], [-1.0, 0.1], [-1.0, 0.3]])
    right = jnp.asarray([[4.0, -4.0], [4.0, -4.0], [-4.0, 4.0], [-4.0, 4.0]])
    flipped = right.at[1].multiply(-1.0).at[3].multiply(-1.0)
    weights = row_weights(
        lambda p: distillation(flipped, logits_of({**p, "scale": jnp.ones(())}, {"x": x})),
        lambda p: optax.softmax_cross_entropy_with_integer_labels(
            logits_of({**p, "scale": jnp.ones(())}, {"x": x}), jnp.asarray([0, 0, 1, 1])
        ).mean(),
        moving,
        0.1,
    )
    assert weights[1] == 0.0 and weights[3] == 0.0
    assert weights[0] > 0.2 and weights[2] > 0.2


def test_hard_labels_are_the_teachers_likeliest_classes() -> None:
    told, own = jnp.asarray([[0.0, 1.0, 0.5], [2.0, 0.0, 1.9]]), jnp.asarray([[0.0, 0.0, 3.0]] * 2)
    expected = -np.asarray(jax.nn.log_softmax(own))[[0, 1], [1, 0]]
    np.testing.assert_allclose(distillation(told, own, hard=True), expected, rtol=1e-6)
    sure = jnp.asarray([[0.0, 99.0, 0.0], [99.0, 0.0, 0.0]])  # there is nothing between the two
    np.testing.assert_allclose(distillation(sure, own), expected, rtol=1e-6)


SCHEDULE = Schedule(teacher=6, rounds=6, kd=10, meta=10, tune=10)


def parts() -> Parts:
    def fresh(key: jax.Array) -> Any:
        return {"down": drawn(key)["down"]}

    return Parts(
        logits=logits_of,
        labels=lambda rows: rows["labels"],
        fresh=fresh,
        teacher=make_optimizer(OptimizerConfig(learning_rate=1e-2, total_steps=6)),
        student=make_optimizer(OptimizerConfig(learning_rate=5e-2, total_steps=30)),
    )


def points(rng: np.random.Generator, rows: int) -> Rows:
    """Two clouds; the class is the sign of the first coordinate."""
    labels = rng.integers(0, 2, rows)
    x = np.stack([2.0 * labels - 1.0, np.zeros(rows)], axis=1) + rng.normal(size=(rows, 2)) * 0.5
    return {"x": x.astype(np.float32), "labels": labels.astype(np.int32)}


def batches(step: int) -> tuple[Rows, Rows, Rows]:
    """The labelled, unlabelled and meta rows of a step, of the step alone."""
    few, many = points(np.random.default_rng(1), 8), points(np.random.default_rng(2), 200)
    rng = np.random.default_rng(100 + step)

    def some(rows: Rows, count: int) -> Rows:
        index = rng.choice(len(rows["labels"]), count, replace=False)
        return {name: value[index] for name, value in rows.items()}

    return some(few, 4), some(many, 16), some(few, 4)


def begun(seed: int = 0) -> SelfTrainingState:
    moving = drawn(jax.random.key(7))
    return fresh_state(moving, {"scale": jnp.ones(())}, parts(), seed)


@pytest.fixture(scope="module")
def step() -> Any:
    return jax.jit(make_self_training_step(parts(), SCHEDULE, eta=1e-2))


def accuracy(params: Any) -> float:
    test = points(np.random.default_rng(3), 500)
    return float((np.asarray(logits_of(params, test)).argmax(1) == test["labels"]).mean())


def test_rounds_beat_their_teacher_and_a_run_repeats_itself_from_any_step(step: Any) -> None:
    state, kept, teacher = begun(), {}, 0.0
    for number in range(SCHEDULE.total):
        kept[number] = state
        state, metrics = step(state, *batches(number))
        if number == SCHEDULE.teacher - 1:
            teacher = accuracy(state.params)
        if number == SCHEDULE.teacher:  # a round begins: the teacher is the model so far
            jax.tree.map(np.testing.assert_array_equal, state.teacher, kept[number].student)
            assert not np.array_equal(state.student["down"]["kernel"],
                                      kept[number].student["down"]["kernel"])  # fmt: skip
    assert accuracy(state.params) > max(teacher + 0.02, 0.95)
    assert int(metrics["round"]) == 5 and int(state.skipped) == 0
    assert state.frozen["scale"] == 1.0
    for first in (3, SCHEDULE.teacher, 20, 31, 40, 100):  # in every phase
        again = kept[first]
        for number in range(first, min(first + 35, SCHEDULE.total)):
            again, _ = step(again, *batches(number))
        jax.tree.map(np.testing.assert_array_equal, again, kept.get(first + 35, state))


def test_rows_without_weight_change_nothing_and_are_counted(step: Any) -> None:
    """Where all states are 0 no loss has a gradient, so no row a weight."""
    state = begun()
    at = SCHEDULE.teacher + SCHEDULE.kd + 2
    frozen = {"scale": jnp.zeros(())}
    state = dataclasses.replace(state, step=jnp.int32(at), frozen=frozen)
    after, metrics = step(state, *batches(at))
    assert int(after.weightless) == 1 and float(metrics["weights"]) == 0.0
    jax.tree.map(np.testing.assert_array_equal, after.student, state.student)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
