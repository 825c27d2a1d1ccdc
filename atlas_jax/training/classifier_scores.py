"""Texts of a file classified and scored: predictions, accuracy, probe and majority."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Int

from atlas_jax.core import multihost, partitioning
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.core.types import Params
from atlas_jax.tasks.base import Record
from atlas_jax.tasks.classification import ClassificationTask
from atlas_jax.training.config import PREDICTIONS
from atlas_jax.training.demonstrations import Demonstrated
from atlas_jax.training.prompted import NO_LABEL, LogitsFn, Texts, class_loss

_PROBE_STEPS = 200


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Classifies the texts of a file, a batch at a time.

    Attributes:
      records, texts: of the file.
      batch_size: texts that are classified at once.
      rows: sharding of a batch.
      mesh: of the devices.
      draws: of demonstrations, over which what is computed is averaged.
    """

    records: Sequence[Record]
    texts: Texts | Demonstrated
    batch_size: int
    rows: NamedSharding
    mesh: Mesh
    draws: int = 1

    def each(self, function: Callable[[Params, Texts], jax.Array]) -> Callable[..., np.ndarray]:
        """What a function makes of parameters and all texts, [rows, ...].

        Texts of like length share a batch, and a program is compiled for each length of batches
        (`Texts.fitted`). With several draws the result is their mean.
        """
        compiled = jax.jit(function, out_shardings=partitioning.replicated(self.mesh))

        def of(params: Params, texts: Texts) -> np.ndarray:
            order_n = np.argsort(texts.lengths(), kind="stable")
            batches = self._batches(texts, order_n)
            found_n = np.concatenate([np.asarray(compiled(params, some)) for some in batches])
            return found_n[: len(order_n)][np.argsort(order_n)]

        def call(params: Params) -> np.ndarray:
            if not isinstance(self.texts, Demonstrated):
                return of(params, self.texts)
            every_n = np.arange(len(self.records))
            shown = [self.texts.at(draw).rows(every_n) for draw in range(self.draws)]
            return np.asarray(np.mean([of(params, texts) for texts in shown], axis=0))

        return call

    def logits(self, logits_fn: LogitsFn) -> Callable[[Params], np.ndarray]:
        """Class logits [rows, c] by the parameters, without dropout."""
        return self.each(lambda params, texts: logits_fn(params, texts, None))

    def _batches(self, texts: Texts, order_n: np.ndarray) -> Iterator[Texts]:
        """The texts in this order, without needless padding; the last batch is filled up."""
        for start in range(0, len(order_n), self.batch_size):
            at = np.minimum(np.arange(start, start + self.batch_size), len(order_n) - 1)
            yield multihost.place(texts.rows(order_n[at]).fitted(), self.rows)


def scores_of(
    task: ClassificationTask, labels_n: Int[np.ndarray, " n"], chosen_n: Int[np.ndarray, " n"]
) -> dict[str, float]:
    """`accuracy` over the rows whose label is known, and over those of each label."""
    known_n = labels_n != NO_LABEL
    right_n = labels_n == chosen_n
    scores = {}
    if known_n.any():
        scores["accuracy"] = float(right_n[known_n].mean())
    for number, label in enumerate(task.labels):
        of_label_n = labels_n == number
        if of_label_n.any():
            scores[f"accuracy_{str(label).lower()}"] = float(right_n[of_label_n].mean())
    return scores


def score_file(
    directory: Path,
    task: ClassificationTask,
    classifier: Classifier,
    logits_nc: Float[np.ndarray, "n c"],
    step: int,
) -> dict[str, float]:
    """Write the predictions of a run's evaluation file, and score them."""
    if multihost.is_first():
        path = directory / PREDICTIONS / f"step_{step:07d}.jsonl"
        write_predictions(path, task, classifier.records, logits_nc)
    return scores_of(task, np.asarray(classifier.texts.labels_b), logits_nc.argmax(axis=1))


def write_predictions(
    path: Path,
    task: ClassificationTask,
    records: Sequence[Record],
    logits_nc: Float[np.ndarray, "n c"],
) -> None:
    """A line for each text: its fields, `predicted_label`, and each label's `probabilities`."""
    shares_nc = np.asarray(jax.nn.softmax(jnp.asarray(logits_nc), axis=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, (_line(task, *row) for row in zip(records, shares_nc, strict=True)))


def _line(task: ClassificationTask, record: Record, shares_c: np.ndarray) -> dict[str, Any]:
    shares = {str(x): float(p) for x, p in zip(task.labels, shares_c, strict=True)}
    chosen = task.labels[int(shares_c.argmax())]
    fields = {"id": record.id, **record.fields, **record.meta}
    return {**fields, "predicted_label": chosen, "probabilities": shares}


def majority_logits(
    task: ClassificationTask, labels_n: Int[np.ndarray, " n"], rows: int
) -> Float[np.ndarray, "{rows} c"]:
    """The same logits for every text: how often each label stands in the training file.

    Of labels that are equally common the first one is chosen.
    """
    counts_c = np.bincount(labels_n, minlength=len(task.labels)).astype(np.float32)
    shares_c = (counts_c + 1e-6) / (counts_c + 1e-6).sum()
    return np.tile(np.log(shares_c), (rows, 1))


def fit_probe(
    features_nd: Float[np.ndarray, "n d"],
    labels_n: Int[np.ndarray, " n"],
    classes: int,
    decay: float,
) -> Any:
    """Multinomial logistic regression, to its minimum: kernel [d, c] and bias [c].

    The loss is summed over the rows, plus half the squared length of the kernel times `decay`
    (decay 1 is scikit-learn's default). Features are used as they are.
    """
    x_nd, labels = jnp.asarray(features_nd), jnp.asarray(labels_n)
    start = (jnp.zeros((x_nd.shape[1], classes)), jnp.zeros((1, classes)))

    def loss(weights: Any) -> jax.Array:
        kernel_dc, bias_1c = weights
        logits_nc = jnp.matmul(x_nd, kernel_dc, precision="highest") + bias_1c
        return class_loss(logits_nc, labels).sum() + 0.5 * decay * jnp.sum(kernel_dc**2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        weights, state = carry
        value, grad = value_and_grad(weights, state=state)
        changes, state = solver.update(grad, state, weights, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(weights, changes), state), None

    fit = jax.jit(lambda w: jax.lax.scan(step, (w, solver.init(w)), None, _PROBE_STEPS)[0][0])
    return fit(start)


def probe_logits(weights: Any, features_nd: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
    """Class logits [n, c] by the probe."""
    kernel_dc, bias_1c = weights
    return np.asarray(jnp.matmul(features_nd, kernel_dc, precision="highest") + bias_1c)
