"""One training step of Atlas: query tokens in, new parameters out.

The step exists in two forms that share everything but "search + gather":

* device form: ``step(state, index, batch)``; the index lies on the devices, and embed
  query, search, gather, read, distil and update compile into one program;
* host form: ``step(state, passages, batch)``; a host searcher (ScaNN) has already found
  the passages, with the query embeddings of ``embed_query``.

Steps come from factories that close over static things and take arrays.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from atlas_jax.core import partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule
from atlas_jax.core.types import EOS_ID, Array, Batch, DeviceIndex, Params, Passages
from atlas_jax.distillation import adist, emdr2, kl, loop, pdist
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.index.exact import exact_search, gather_passages
from atlas_jax.reader import fid
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.training.state import (
    PARTS,
    Models,
    Optimizers,
    RetrieverTraining,
    TrainState,
    merge,
    split_trainable,
)

Metrics = dict[str, Array]
Retrieve = Callable[[Any, Array, Batch], Passages]


@gin.configurable
@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What one step does.

    Attributes:
      k: passages per query that are read.
      rerank: 0, or L > k: search L passages with the index's embeddings, embed these anew
        with the present passage tower, and read the k best of them, in training and in
        evaluation. For an int8 index, whose rows are rounded, and for ``joint`` training, whose
        index is stale between its refreshes.
      reader_length: tokens of one reader input, query + passage + end token.
      retriever_training: ``joint`` trains both towers, ``query_side`` the query tower
        alone (the index never goes stale), ``fixed`` neither.
      accumulate: microbatches per step; the gradients are those of the whole batch.
    """

    k: int = 20
    reader_length: int = 512
    retriever_training: RetrieverTraining = "query_side"
    accumulate: int = 1
    rerank: int = 0

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
          UserError: names the field and what it may be.
        """
        if self.retriever_training not in ("joint", "query_side", "fixed"):
            raise UserError(
                f"StepConfig.retriever_training = {self.retriever_training!r}; "
                "use 'joint', 'query_side' or 'fixed'"
            )
        for field in ("k", "reader_length", "accumulate"):
            if getattr(self, field) < 1:
                raise UserError(f"StepConfig.{field} = {getattr(self, field)} must be at least 1")
        if self.rerank and self.rerank <= self.k:
            raise UserError(
                f"StepConfig.rerank = {self.rerank} must be 0, or more than StepConfig.k = {self.k}"
            )

    @property
    def searched(self) -> int:
        """Passages per query that the search gives."""
        return self.rerank or self.k

    @property
    def embeds_passages(self) -> bool:
        """Whether a step runs the passage tower, for which the index holds the tokens."""
        return self.retriever_training == "joint" or self.rerank > 0


def make_device_retrieve(k: int, mesh: Mesh, recall_target: float = 1.0) -> Retrieve:
    """Search and gather k passages inside the compiled step; the source is a ``DeviceIndex``.

    ``recall_target``: see `exact_search`.
    """

    def retrieve(index: DeviceIndex, query_be: Array, batch: Batch) -> Passages:
        excluded_bx = batch.excluded_rows_bx
        found = exact_search(index, query_be, k, excluded_bx, mesh, recall_target)
        return gather_passages(index, found, mesh=mesh)

    return retrieve


def retrieved_already(passages: Passages, query_be: Array, batch: Batch) -> Passages:
    """The host form's "search": the passages come in as an argument."""
    del query_be, batch
    return passages


def no_passages(batch: Batch) -> Passages:
    """Closed book: one empty passage, so that the reader sees the query alone."""
    rows = batch.query_tokens_bq.shape[0]
    return Passages(
        rows_bk=jnp.full((rows, 1), -1, jnp.int32),
        scores_bk=jnp.zeros((rows, 1), jnp.float32),
        reader_tokens_bkl=jnp.zeros((rows, 1, 1), jnp.int32),
        retriever_tokens_bkm=jnp.zeros((rows, 1, 1), jnp.int32),
        mask_bk=jnp.ones((rows, 1), bool),
    )


def make_train_step(
    models: Models,
    config: StepConfig,
    distillation: DistillationConfig,
    optimizers: Optimizers,
    retrieve: Retrieve,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Build ``step(state, source, batch) -> (state, metrics)``, to be jitted by the caller.

    ``source`` is what ``retrieve`` searches: a ``DeviceIndex`` or the ``Passages``
    themselves. A step whose loss or gradient is not finite changes no parameter and no
    optimiser state and is counted in ``state.skipped``.
    """
    loss_sums = make_loss_sums(models, config, distillation, retrieve)

    def step(state: TrainState, source: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        trainable, frozen = split_trainable(state.params, config.retriever_training)
        grads, sums = _accumulated_grads(
            loss_sums, config.accumulate, trainable, frozen, source, batch, key
        )
        losses = {p: sums[p]["loss"] / sums[p]["count"] for p in PARTS}
        norms = {p: optax.tree.norm(grads[p]) / sums[p]["count"] for p in PARTS}
        finite = jnp.isfinite(sum(losses.values()) + sum(norms.values()))

        def update() -> tuple[Params, Any]:
            updated, opt_state = {}, {}
            for part in PARTS:
                # Sums become means here, by a product, which costs no pass over the gradients
                # of its own; a division for each number would.
                share = 1 / sums[part]["count"]
                means = jax.tree.map(lambda g, share=share: g * share, grads[part])
                changes, opt_state[part] = optimizers[part].update(
                    means, state.opt_state[part], trainable[part], grad_norm=norms[part]
                )
                updated[part] = optax.apply_updates(trainable[part], changes)
            return updated, opt_state

        # One branch or the other, not a choice per number: that would read the state twice.
        updated, opt_state = jax.lax.cond(finite, update, lambda: (trainable, state.opt_state))
        new_state = TrainState(
            step=state.step + 1,
            params=merge(updated, frozen),
            opt_state=opt_state,
            key=state.key,
            skipped=state.skipped + jnp.where(finite, 0, 1),
        )
        metrics = {
            "reader_loss": losses["reader"],
            "retriever_loss": losses["retriever"],
            "reader_grad_norm": norms["reader"],
            "retriever_grad_norm": norms["retriever"],
            "target_tokens": sums["reader"]["count"],
            "skipped": new_state.skipped,
        }
        return new_state, metrics

    return step


def compile_train_step(
    step: Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]],
    shardings: TrainState,
    mesh: Mesh,
    rules: Sequence[Rule],
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Jit a step: state as in ``shardings`` and donated, batch rows over the data axes.

    The source keeps the sharding it was created with. Call the result inside
    ``partitioning.activate(mesh, rules)``.
    """
    rows = NamedSharding(mesh, partitioning.logical_to_spec(("batch",), rules))
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, None, rows),
        out_shardings=(shardings, partitioning.replicated(mesh)),
    )


def embed_query(retriever: DualEncoder, params: Params, batch: Batch) -> Array:
    """Query embeddings [b, e] without dropout, by ``params["retriever"]``; searchers take them."""
    return embed(retriever, params["retriever"], "embed_query", batch.retriever_tokens_br)


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

    Sums and not means are added up, so that the result does not depend on how target
    tokens fall into microbatches.
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


def make_loss_sums(
    models: Models, config: StepConfig, distillation: DistillationConfig, retrieve: Retrieve
) -> Callable[..., tuple[Array, Any]]:
    """Build ``loss_sums(trainable, frozen, source, batch, key) -> (total, sums)``.

    ``sums[part]`` holds ``loss`` (a sum) and ``count`` (what to divide it by: target
    tokens for the reader). The reader's loss has no gradient for the retriever and the
    other way round, so one backward pass of the total serves both.
    """
    trains_retriever = config.retriever_training != "fixed"

    def loss_sums(
        trainable: Params, frozen: Params, source: Any, batch: Batch, key: Array
    ) -> tuple[Array, Any]:
        params = merge(trainable, frozen)
        reader_key, query_key, passage_key = jax.random.split(key, 3)
        query_be = embed_query(models.retriever, params, batch)
        passages = retrieve(source, jax.lax.stop_gradient(query_be), batch)
        if config.rerank:
            passages = rerank(models.retriever, params["retriever"], query_be, passages, config.k)
        targets_bt = jnp.where(batch.weight_b[:, None] > 0, batch.target_tokens_bt, 0)
        decoder_bt, targets_bt = fid.join_prompt(batch.prompt_tokens_bp, targets_bt)
        tokens_bkl = fid.join_inputs(
            batch.query_tokens_bq,
            passages.reader_tokens_bkl,
            passages.mask_bk,
            config.reader_length,
            EOS_ID,
        )
        has_dropout = models.reader.config.dropout_rate > 0
        encoder_key, decoder_key = jax.random.split(reader_key)
        enc_bkld = fid.encode(
            models.reader, params["reader"], tokens_bkl, encoder_key if has_dropout else None
        )
        logits_btv = fid.fused_logits(
            models.reader,
            params["reader"],
            enc_bkld,
            tokens_bkl,
            decoder_bt,
            decoder_key if has_dropout else None,
        )
        reader_sum, tokens = fid.target_loss(logits_btv, targets_bt)
        sums = {"reader": {"loss": reader_sum, "count": jnp.maximum(tokens, 1)}}
        if not trains_retriever:
            sums["retriever"] = {"loss": jnp.zeros(()), "count": jnp.ones(())}
            return reader_sum, sums

        scores_bk = _retriever_scores(
            models, config, params["retriever"], query_be, batch, passages, query_key, passage_key
        )
        # Gold scores are taken without dropout; without any, the encoder's output is reused.
        gold_params = jax.lax.stop_gradient(params["reader"])
        gold_enc_bkld = (
            fid.encode(models.reader, gold_params, tokens_bkl)
            if has_dropout
            else jax.lax.stop_gradient(enc_bkld)
        )
        distil_sum, rows = distillation_loss(
            models, distillation, gold_params, gold_enc_bkld, tokens_bkl, targets_bt,
            scores_bk, passages.mask_bk, batch.weight_b, decoder_bt,
        )  # fmt: skip
        sums["retriever"] = {"loss": distil_sum, "count": jnp.maximum(rows, 1)}
        return reader_sum + distil_sum, sums

    return loss_sums


def _retriever_scores(
    models: Models,
    config: StepConfig,
    params: Params,
    query_be: Array,
    batch: Batch,
    passages: Passages,
    query_key: Array,
    passage_key: Array,
) -> Array:
    """s_bk = q.p / sqrt(e), with gradient for every tower that is trained."""
    if models.retriever.config.dropout_rate > 0:
        query_be = embed(
            models.retriever, params, "embed_query", batch.retriever_tokens_br, query_key
        )
    else:
        passage_key = None
    if config.retriever_training == "query_side" and passages.embeddings_bke is not None:
        # The passage tower does not move: these are exact, but for the rounding of the index.
        passage_bke = passages.embeddings_bke.astype(query_be.dtype)
    else:
        assert passages.retriever_tokens_bkm is not None
        b, k, m = passages.retriever_tokens_bkm.shape
        flat = passages.retriever_tokens_bkm.reshape(b * k, m)  # every passage on its own
        passage_bke = embed(models.retriever, params, "embed_passage", flat, passage_key).reshape(
            b, k, -1
        )
    return jnp.einsum("be,bke->bk", query_be, passage_bke) / jnp.sqrt(query_be.shape[-1])


def rerank(
    retriever: DualEncoder, params: Params, query_be: Array, passages: Passages, k: int
) -> Passages:
    """The k best of the passages found, by what the present passage tower gives for them.

    No gradient flows through it. Equal scores keep the order of the search.

    Args:
      params: of the retriever.
      passages: more than k a query; those that are none stay last.
    """
    assert passages.retriever_tokens_bkm is not None
    b, found, m = passages.retriever_tokens_bkm.shape
    flat = passages.retriever_tokens_bkm.reshape(b * found, m)  # every passage on its own
    fresh_bke = embed(retriever, params, "embed_passage", flat).reshape(b, found, -1)
    query_be, fresh_bke = jax.lax.stop_gradient((query_be, fresh_bke))
    scores_bk = jnp.einsum("be,bke->bk", query_be, fresh_bke).astype(jnp.float32)
    scores_bk, best_bk = jax.lax.top_k(jnp.where(passages.mask_bk, scores_bk, -jnp.inf), k)

    def take(array: Array) -> Array:
        return jnp.take_along_axis(array, best_bk.reshape(b, k, *(1,) * (array.ndim - 2)), axis=1)

    return Passages(
        rows_bk=take(passages.rows_bk),
        scores_bk=scores_bk,
        reader_tokens_bkl=take(passages.reader_tokens_bkl),
        retriever_tokens_bkm=take(passages.retriever_tokens_bkm),
        mask_bk=take(passages.mask_bk),
        embeddings_bke=take(fresh_bke),
    )


def distillation_loss(
    models: Models,
    config: DistillationConfig,
    params: Params,
    enc_bkld: Array,
    tokens_bkl: Array,
    targets_bt: Array,
    scores_bk: Array,
    mask_bk: Array,
    weight_b: Array,
    decoder_bt: Array,
) -> tuple[Array, Array]:
    """The chosen retriever loss as (sum, count), method section "four ways to train".

    ``params`` and ``enc_bkld`` carry no gradient; ``scores_bk`` does. ``decoder_bt`` is what
    the decoder is given, the targets behind their prompt (`fid.join_prompt`).
    """
    reader_args = (models.reader, params, enc_bkld, tokens_bkl, targets_bt)
    given: Any = {"decoder_bt": decoder_bt}
    if config.loss == "emdr2":
        logp_bkt = fid.passage_logprobs(*reader_args, config.gold_temperature, **given)
        return emdr2.loss(logp_bkt, scores_bk, targets_bt, mask_bk, weight_b, config)
    if config.loss == "pdist":
        gold_bk = pdist.gold_scores(fid.passage_logprobs(*reader_args, **given), targets_bt)
    elif config.loss == "loop":
        gold_bk = loop.gold_scores(fid.leave_one_out_logprobs(*reader_args, **given), targets_bt)
    else:
        mass_bk = fid.cross_attention_mass(*reader_args, **given)
        layers = models.reader.config.num_decoder_layers
        gold_bk = adist.gold_scores(mass_bk, targets_bt, layers, config.adist_normalizer)
    return kl.distill_loss(gold_bk, scores_bk, mask_bk, weight_b, config)


def passage_tower(retriever: DualEncoder) -> Callable[[Params, Array], Array]:
    """The function (parameters of the retriever, tokens_nm) -> embeddings_ne, without dropout."""
    return lambda params, tokens_nm: embed(retriever, params, "embed_passage", tokens_nm)


def embed(
    retriever: DualEncoder,
    params: Params,
    tower: str,
    tokens: Array,
    dropout_key: Array | None = None,
) -> Array:
    """Embed tokens, [n, l] -> [n, e], with the named tower; dropout only with a key."""
    return retriever.apply(
        {"params": params},
        tokens,
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method=tower,
    )
