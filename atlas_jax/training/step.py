"""One training step of Atlas: query tokens in, new parameters out.

The step has two forms, which differ only in "search + gather":

* device form: ``step(state, index, batch)``; the index lies on the devices, and embed
  query, search, gather, read, distil and update compile into one program;
* host form: ``step(state, passages, batch)``; a host searcher (ScaNN) has already found
  the passages, with the query embeddings of ``embed_query``.

Steps come from factories that close over static things and take arrays.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from atlas_jax.core import partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule
from atlas_jax.core.parts import PARTS
from atlas_jax.core.types import Array, Batch, Params, Passages
from atlas_jax.corpus.retrieval import Retrieve
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.models.parameters import Models
from atlas_jax.training.config import StepConfig
from atlas_jax.training.loss import make_loss_sums
from atlas_jax.training.state import Optimizers, TrainState, merge, split_trainable, what_trains

Metrics = dict[str, Array]


def make_train_step(
    models: Models,
    config: StepConfig,
    distillation: DistillationConfig,
    optimizers: Optimizers,
    retrieve: Retrieve,
    frozen_steps: int = 0,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Build ``step(state, source, batch) -> (state, metrics)``, to be jitted by the caller.

    ``source`` is what ``retrieve`` searches: a ``DeviceIndex`` or the ``Passages`` themselves. A
    step whose loss or gradient is not finite changes no parameter and no optimiser state, and is
    counted in ``state.skipped``. In the first ``frozen_steps`` the retriever's optimiser changes
    nothing; then its gradient does not count in the joint norm of StepConfig.clip.
    """
    loss_sums = make_loss_sums(models, config, distillation, retrieve)
    trains = what_trains(config, models)

    def step(state: TrainState, source: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        trainable, frozen = split_trainable(state.params, trains)
        grads, sums = _accumulated_grads(
            loss_sums, config.accumulate, trainable, frozen, source, batch, key
        )
        losses = {p: sums[p]["loss"] / sums[p]["count"] for p in PARTS}
        norms = {p: optax.tree.norm(grads[p]) / sums[p]["count"] for p in PARTS}
        finite = jnp.isfinite(sum(losses.values()) + sum(norms.values()))
        bounded = norms
        if config.clip == "together":
            moves = jnp.where(state.step < frozen_steps, 0.0, 1.0)
            both = jnp.hypot(norms["reader"], norms["retriever"] * moves)
            bounded = {"reader": both, "retriever": both}

        def update() -> tuple[Params, Any]:
            updated, opt_state = {}, {}
            for part in PARTS:
                # Sums become means by a product: XLA joins it with the next operation. A division
                # of each number would cost a pass over the gradients.
                share = 1 / sums[part]["count"]
                means = jax.tree.map(lambda g, share=share: g * share, grads[part])
                changes, opt_state[part] = optimizers[part].update(
                    means, state.opt_state[part], trainable[part], grad_norm=bounded[part]
                )
                updated[part] = optax.apply_updates(trainable[part], changes)
            return updated, opt_state

        # One branch or the other. Choosing for each number would read the state twice.
        updated, opt_state = jax.lax.cond(finite, update, lambda: (trainable, state.opt_state))
        new_state = TrainState(
            step=state.step + 1,
            params=merge(updated, frozen),
            opt_state=opt_state,
            key=state.key,
            skipped=state.skipped + jnp.where(finite, 0, 1),
        )
        metrics = _metrics(sums, losses, norms) | {"skipped": new_state.skipped}
        if config.packs:  # share of the microbatches whose passages fitted into their rows
            metrics["packed"] = sums["packed"] / config.accumulate
        return new_state, metrics

    return step


def _metrics(sums: Any, losses: Metrics, norms: Metrics) -> Metrics:
    """What a step tells; of a reader with experts, also whether they are used evenly."""
    reader = sums["reader"]
    found = {f"{part}_loss": losses[part] for part in PARTS}
    found |= {f"{part}_grad_norm": norms[part] for part in PARTS}
    found["target_tokens"] = reader["count"]
    if "balance" in reader:
        found["reader_balance_loss"] = reader["balance"] / reader["count"]
        found["reader_dropped_share"] = reader["dropped"] / reader["count"]
    return found


def compile_train_step(
    step: Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]],
    shardings: TrainState,
    mesh: Mesh,
    rules: Sequence[Rule],
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Jit a step. The state is donated; batch rows are spread over the data axes.

    The state is sharded as ``shardings`` says; the source keeps its sharding. Call the result
    inside ``partitioning.activate(mesh, rules)``.
    """
    rows = NamedSharding(mesh, partitioning.logical_to_spec(("batch",), rules))
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, None, rows),
        out_shardings=(shardings, partitioning.replicated(mesh)),
    )


def _accumulated_grads(
    loss_sums: Callable[..., tuple[Array, Any]],
    accumulate: int,
    trainable: Params,
    frozen: Params,
    source: Any,
    batch: Batch,
    key: Array,
) -> tuple[Params, Any]:
    """Gradients of the loss sums, and the sums, over ``accumulate`` microbatches.

    It adds sums, not means. So the result does not depend on how the target tokens are divided
    into microbatches.
    """
    grad_fn = jax.grad(loss_sums, has_aux=True)
    if accumulate == 1:
        return grad_fn(trainable, frozen, source, batch, key)
    rows = batch.weight_b.shape[0]
    if rows % accumulate:
        raise UserError(f"StepConfig.accumulate = {accumulate} does not divide the batch of {rows}")

    def split(x: Array) -> Array:
        # Row i goes to microbatch i % accumulate: each keeps a share of every device's rows.
        return x.reshape(rows // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)

    per_batch = isinstance(source, Passages)
    micro = jax.tree.map(split, (batch, source if per_batch else None))

    def body(total: Any, inputs: Any) -> tuple[Any, None]:
        (micro_batch, micro_source), i = inputs
        part = grad_fn(
            trainable,
            frozen,
            micro_source if per_batch else source,
            micro_batch,
            jax.random.fold_in(key, i),
        )
        return jax.tree.map(jnp.add, total, part), None

    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(
        grad_fn, trainable, frozen, first[1] if per_batch else source, first[0], key
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, (micro, jnp.arange(accumulate)))[0]
