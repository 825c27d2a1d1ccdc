"""One step of LiST's self-training (arXiv 2110.06274): teacher, distillation, weights, tuning.

The loop as the released code runs it (LiST: run.sh, src/trainer.py). One counter says everything:

    steps 0 .. teacher_steps - 1        the teacher learns the labelled rows
    then rounds of r = kd + meta + tune steps; at a round's first step the teacher becomes the model
    so far, and the student begins anew: pretrained parameters, fresh adapters, a fresh optimiser
        0 .. kd                         sum of KL(teacher || student) over unlabelled rows
        kd + 1 .. kd + meta - 1         the same with a weight for each row
        kd + meta .. r - 1              cross-entropy of labelled rows

The step that begins the meta phase is still plain distillation, as in the released code.

A row's weight says whether its pseudo-label helps on labelled rows: one SGD step on the weighted
losses is imagined, and u_i is by how much the labelled loss falls with e_i at e = 0,

    u_i = max(0, -d labelled(theta - eta sum e_i grad l_i) / d e_i)
        = max(0, eta <grad l_i, grad labelled>)
    w_i = u_i / (sum u + 1e-6)

These are products of one gradient with the Jacobian of the losses: one vjp and one jvp (see
`_along`), with no second derivative of a loss and no gradient of a single row. eta is small, so the
1e-6 matters: weights may sum to less than 1.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Float

from atlas_jax.core import trees
from atlas_jax.core.types import Array, Params
from atlas_jax.training.encoder_state import updated

Metrics = dict[str, Array]
TEACHER, KD, META, TUNE = range(4)  # the phases
_LEAST = 1e-6


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many steps each phase has."""

    teacher: int
    rounds: int
    kd: int
    meta: int
    tune: int

    @property
    def round(self) -> int:
        """Steps of a round."""
        return self.kd + self.meta + self.tune

    @property
    def total(self) -> int:
        """All steps."""
        return self.teacher + self.rounds * self.round

    def place(self, step: Any) -> tuple[Any, Any, Any]:
        """The phase of a step, the number of its round from 0 (-1: the teacher), its place there.

        Args:
          step: a number or an int32 scalar that is traced.
        """
        after = step - self.teacher
        number = jnp.where(after < 0, -1, after // self.round)
        at = jnp.where(after < 0, step, after % self.round)
        distils = (at <= self.kd) & (at < self.kd + self.meta)
        in_round = jnp.where(distils, KD, jnp.where(at < self.kd + self.meta, META, TUNE))
        return jnp.where(after < 0, TEACHER, in_round), number, at


@flax.struct.dataclass
class SelfTrainingState:
    """Everything a step changes.

    Attributes:
      step: int32 scalar, the counter that says phase and round.
      student: what trains of the model that learns; before the first round, of the teacher.
      teacher: what trains of the model that labels.
      frozen: what never changes.
      pretrained: what trains, as it was before any step.
      opt_state: optax state of the student.
      key: uint32 key data; step `i` draws its randomness from `fold_in(key, i)`.
      skipped: int32 scalar, steps left out because loss or gradient was not finite.
      weightless: int32 scalar, steps left out because every row's weight was 0.
    """

    step: Array
    student: Params
    teacher: Params
    frozen: Params
    pretrained: Params
    opt_state: Any
    key: Array
    skipped: Array
    weightless: Array

    @property
    def params(self) -> Params:
        """The student's parameters, whole."""
        return trees.joined(self.student, self.frozen)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the step is made of; no model is known here.

    Attributes:
      logits: (parameters, rows, key for dropout or None) -> class logits [b, c].
      labels: rows -> int32 [b].
      fresh: key -> what of the moving parameters a round draws anew, such as adapters.
      teacher, student: the optimisers; their states have one form.
    """

    logits: Callable[[Params, Any, jax.Array | None], jax.Array]
    labels: Callable[[Any], Any]
    fresh: Callable[[jax.Array], Params]
    teacher: optax.GradientTransformationExtraArgs
    student: optax.GradientTransformationExtraArgs


def fresh_state(moving: Params, frozen: Params, parts: Parts, seed: int) -> SelfTrainingState:
    """A state of step 0; `moving` has its fresh adapters already."""

    def copy(tree: Params) -> Params:
        return jax.tree.map(lambda x: jnp.array(x), tree)

    def zero() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    return SelfTrainingState(
        step=zero(),
        student=copy(moving),
        teacher=copy(moving),
        frozen=frozen,
        pretrained=copy(moving),
        opt_state=parts.teacher.init(moving),
        key=jax.random.key_data(jax.random.key(seed)),
        skipped=zero(),
        weightless=zero(),
    )


def distillation(
    teacher_bc: Float[Array, "b c"], student_bc: Float[Array, "b c"], hard: bool = False
) -> Float[Array, " b"]:
    """KL(teacher || student) of each row, [b, c] and [b, c] -> [b], at temperature 1.

    Args:
      hard: the teacher's likeliest class counts as certain; the result is -log q of that class.
    """
    log_p, log_q = jax.nn.log_softmax(teacher_bc), jax.nn.log_softmax(student_bc)
    if hard:
        return optax.softmax_cross_entropy_with_integer_labels(log_q, log_p.argmax(axis=-1))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def row_weights(
    losses: Callable[[Params], jax.Array],
    labelled: Callable[[Params], jax.Array],
    moving: Params,
    eta: float,
) -> Float[Array, " u"]:
    """The weights w_i of unlabelled rows, [u].

    Args:
      losses: moving parameters -> losses of the unlabelled rows, [u].
      labelled: moving parameters -> mean loss of the labelled rows.
      moving: what trains.
      eta: of the imagined SGD step.
    """
    towards = jax.grad(labelled)(moving)
    products_u = _along(losses, moving, towards)
    useful_u = jnp.maximum(eta * products_u, 0.0)
    return useful_u / (useful_u.sum() + _LEAST)


def _along(losses: Callable[[Params], jax.Array], moving: Params, towards: Params) -> jax.Array:
    """The Jacobian of the losses times a direction, [u]: what `jax.jvp` gives.

    A vjp is linear in its cotangent u, so its own vjp is the Jacobian again. `jax.jvp` itself stops
    at the products of the layers, whose derivative is written backwards alone (`core.layers`).
    """
    values_u, pull = jax.vjp(losses, moving)

    def product(u: jax.Array) -> jax.Array:
        (pulled,) = pull(u)
        return optax.tree.vdot(pulled, towards)

    return jax.grad(product)(jnp.zeros_like(values_u))


def make_self_training_step(
    parts: Parts, schedule: Schedule, eta: float, weighted: bool = True, hard: bool = False
) -> Callable[..., tuple[SelfTrainingState, Metrics]]:
    """Build `step(state, labelled, unlabelled, meta) -> (state, metrics)`, for the caller to jit.

    Each phase reads only the rows that it needs. Dropout is on where a model learns, and off for
    the teacher's labels and for the weights.

    Args:
      eta: learning rate of the trial step by which `row_weights` judges each row.
      weighted: False: the meta phase distils without weights, as the phase before it does.
      hard: see `distillation`.
    """

    def step(
        state: SelfTrainingState, labelled: Any, unlabelled: Any, meta: Any
    ) -> tuple[SelfTrainingState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        phase, number, at = schedule.place(state.step)
        state = _begun(state, parts, (number >= 0) & (at == 0), number)
        whole = _Whole(parts, state.frozen, hard)

        def supervised(moving: Params) -> tuple[jax.Array, jax.Array]:
            return whole.labelled(moving, labelled, key), jnp.ones(())

        def distilled(moving: Params) -> tuple[jax.Array, jax.Array]:
            return whole.losses(moving, state.teacher, unlabelled, key).mean(), jnp.ones(())

        def reweighted(moving: Params) -> tuple[jax.Array, jax.Array]:
            weights_u = row_weights(
                lambda p: whole.losses(p, state.teacher, unlabelled, None),
                lambda p: whole.labelled(p, meta, None),
                jax.lax.stop_gradient(moving),
                eta,
            )
            losses_u = whole.losses(moving, state.teacher, unlabelled, key)
            total = weights_u.sum()
            return jnp.sum(jax.lax.stop_gradient(weights_u) * losses_u), total

        branches = [supervised, distilled, reweighted if weighted else distilled, supervised]
        graded = [jax.value_and_grad(branch, has_aux=True) for branch in branches]
        (loss, total), grads = jax.lax.switch(phase, graded, state.student)
        return _moved(state, parts, phase, loss, total, grads, number)

    return step


@dataclasses.dataclass(frozen=True)
class _Whole:
    """Losses over the moving parameters beside the frozen ones."""

    parts: Parts
    frozen: Params
    hard: bool

    def _logits(self, moving: Params, rows: Any, key: jax.Array | None) -> jax.Array:
        return self.parts.logits(trees.joined(moving, self.frozen), rows, key)

    def labelled(self, moving: Params, rows: Any, key: jax.Array | None) -> jax.Array:
        """Mean cross-entropy over the classes."""
        logits_bc = self._logits(moving, rows, key)
        losses_b = optax.softmax_cross_entropy_with_integer_labels(
            logits_bc, jnp.asarray(self.parts.labels(rows))
        )
        return losses_b.mean()

    def losses(
        self, moving: Params, teacher: Params, rows: Any, key: jax.Array | None
    ) -> jax.Array:
        """KL of each row to what the teacher says of it, without dropout."""
        told_bc = jax.lax.stop_gradient(self._logits(teacher, rows, None))
        return distillation(told_bc, self._logits(moving, rows, key), self.hard)


def _begun(
    state: SelfTrainingState, parts: Parts, begins: jax.Array, number: jax.Array
) -> SelfTrainingState:
    """At the first step of a round: the teacher is the model so far, the student begins anew."""
    # Apart from the steps' own keys, which count from 0.
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), -1 - number)

    def anew(_: None) -> tuple[Params, Params, Any]:
        flat = traverse_util.flatten_dict(state.pretrained, sep="/")
        drawn = traverse_util.flatten_dict(parts.fresh(key), sep="/")
        kept = {path: drawn.get(path, leaf) for path, leaf in flat.items()}
        student = traverse_util.unflatten_dict(kept, sep="/")
        return student, state.student, parts.student.init(student)

    def on(_: None) -> tuple[Params, Params, Any]:
        return state.student, state.teacher, state.opt_state

    student, teacher, opt_state = jax.lax.cond(begins, anew, on, None)
    return dataclasses.replace(state, student=student, teacher=teacher, opt_state=opt_state)


def _moved(
    state: SelfTrainingState,
    parts: Parts,
    phase: jax.Array,
    loss: jax.Array,
    total: jax.Array,
    grads: Params,
    number: jax.Array,
) -> tuple[SelfTrainingState, Metrics]:
    """The state after the step's update."""
    useful = total > 0

    def by(optimizer: optax.GradientTransformationExtraArgs) -> Any:
        return updated(optimizer, loss, grads, state.opt_state, state.student, useful)

    student, opt_state, norm, finite = jax.lax.cond(
        phase == TEACHER, lambda: by(parts.teacher), lambda: by(parts.student)
    )
    new = dataclasses.replace(
        state,
        step=state.step + 1,
        student=student,
        opt_state=opt_state,
        skipped=state.skipped + jnp.where(finite, 0, 1),
        weightless=state.weightless + jnp.where(useful, 0, 1),
    )
    metrics = {
        "loss": loss, "grad_norm": norm, "phase": phase, "round": number, "weights": total,
        "skipped": new.skipped, "weightless": new.weightless,
    }  # fmt: skip
    return new, metrics
