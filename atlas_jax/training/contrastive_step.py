"""One step of contrastive pretraining: pairs of token rows in, a better retriever out."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from atlas_jax.core.errors import UserError
from atlas_jax.core.types import Array, Params
from atlas_jax.retriever.contrastive import (
    ContrastiveConfig,
    Queue,
    empty_queue,
    follow,
    moco_loss,
    push,
)
from atlas_jax.retriever.dual_encoder import DualEncoder

Metrics = dict[str, Array]


@flax.struct.dataclass
class ContrastiveState:
    """Everything a contrastive step changes.

    Attributes:
        step: int32 scalar, steps taken, skipped ones included.
        params: The retriever's.
        key_params: The momentum encoder's, of the same form; None without momentum.
        opt_state: optax state over `params`.
        queue: Earlier keys; None without a queue.
        key: uint32 key data; step `i` draws its randomness from `fold_in(key, i)`.
        skipped: int32 scalar, steps left out because loss or gradient was not finite.
    """

    step: Array
    params: Params
    key_params: Params | None
    opt_state: optax.OptState
    queue: Queue | None
    key: Array
    skipped: Array


def make_contrastive_state(
    dual_encoder: DualEncoder,
    params: Params,
    config: ContrastiveConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
) -> ContrastiveState:
    """Wrap retriever parameters into a fresh state; no buffer is shared with `params`.

    Raises:
        UserError: Momentum with untied towers: the passage tower would get no gradient and never
            learn.
    """
    if config.momentum and not dual_encoder.config.tied:
        raise UserError(
            f"ContrastiveConfig.momentum = {config.momentum} needs RetrieverConfig.tied = True: "
            "keys get no gradient, so a passage tower of its own would never learn"
        )

    def copy(tree: Params) -> Params:
        return jax.tree.map(lambda x: jnp.array(x), tree)

    return ContrastiveState(
        step=jnp.zeros((), jnp.int32),
        params=copy(params),
        key_params=copy(params) if config.momentum else None,
        opt_state=optimizer.init(params),
        queue=empty_queue(config.queue_size, dual_encoder.config.embedding_dim),
        key=jax.random.key_data(jax.random.key(seed)),
        skipped=jnp.zeros((), jnp.int32),
    )


def make_contrastive_step(
    dual_encoder: DualEncoder,
    config: ContrastiveConfig,
    optimizer: optax.GradientTransformation,
) -> Callable[[ContrastiveState, Array, Array], tuple[ContrastiveState, Metrics]]:
    """Build `step(state, tokens_a_bl, tokens_b_cl) -> (state, metrics)`, for the caller to jit.

    Row i of b is the positive of row i of a: two crops of a document
    (`retriever.contrastive.crop_pair`), or a question and its passage. Further rows of b are hard
    negatives, the same number for each row of a, those of row 0 first. The query tower embeds a.
    The passage tower embeds b; with momentum the slow encoder does, without dropout. A step whose
    loss or gradient is not finite changes no parameter, optimiser state or queue, and is counted in
    `state.skipped`.
    """

    optimizer = optax.with_extra_args_support(optimizer)

    def embed(params: Params, method: str, tokens_bl: Array, key: Array | None) -> Array:
        rngs = {} if key is None else {"dropout": key}
        return dual_encoder.apply(
            {"params": params}, tokens_bl, key is None, method=method, rngs=rngs
        )

    def loss_fn(
        params: Params, state: ContrastiveState, tokens_a_bl: Array, tokens_b_bl: Array, key: Array
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        key_a, key_b = jax.random.split(key)
        query_be = embed(params, "embed_query", tokens_a_bl, key_a)
        if state.key_params is None:
            keys_be = embed(params, "embed_passage", tokens_b_bl, key_b)
        else:
            keys_be = embed(state.key_params, "embed_passage", tokens_b_bl, None)
        rows = query_be.shape[0]
        hard_ce = keys_be[rows:] if keys_be.shape[0] > rows else None
        keys_be = keys_be[:rows]
        loss, metrics = moco_loss(
            query_be, keys_be, state.queue, config.temperature, config.in_batch, hard_ce
        )
        return loss, (keys_be, {"loss": loss, **metrics})

    def step(
        state: ContrastiveState, tokens_a_bl: Array, tokens_b_bl: Array
    ) -> tuple[ContrastiveState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        grads, (keys_be, metrics) = jax.grad(loss_fn, has_aux=True)(
            state.params, state, tokens_a_bl, tokens_b_bl, key
        )
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"] + norm)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params, grad_norm=norm)
        params = optax.apply_updates(state.params, changes)
        new, old = (params, opt_state), (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        key_params = state.key_params
        if key_params is not None:
            key_params = follow(key_params, params, jnp.where(finite, config.momentum, 1.0))
        new_state = ContrastiveState(
            step=state.step + 1,
            params=params,
            key_params=key_params,
            opt_state=opt_state,
            queue=push(state.queue, keys_be, accept=finite),
            key=state.key,
            skipped=state.skipped + jnp.where(finite, 0, 1),
        )
        return new_state, {**metrics, "grad_norm": norm, "skipped": new_state.skipped}

    return step
