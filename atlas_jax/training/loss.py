"""The losses of one step: the reader's, and the one that teaches the retriever."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from atlas_jax.core.errors import UserError
from atlas_jax.core.experts import Routed, balance
from atlas_jax.core.packing import Inputs, Packed, packed_or_padded_loss
from atlas_jax.core.parts import PARTS
from atlas_jax.core.types import EOS_ID, Array, Batch, Params, Passages
from atlas_jax.corpus.retrieval import Retrieve, rerank
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.distillation.signals import Signals
from atlas_jax.distillation.table import LOSSES
from atlas_jax.models.parameters import Models
from atlas_jax.models.towers import embed, embed_passages, embed_query
from atlas_jax.reader import fid, inputs
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.training.config import StepConfig
from atlas_jax.training.state import merge


def make_loss_sums(
    models: Models, config: StepConfig, distillation: DistillationConfig, retrieve: Retrieve
) -> Callable[..., tuple[Array, Any]]:
    """Build ``loss_sums(trainable, frozen, source, batch, key) -> (total, sums)``.

    ``sums[part]`` holds ``loss`` (a sum) and ``count`` (its divisor; for the reader the number of
    target tokens), and ``sums["packed"]`` is 1 if passages shared rows. With Switch layers the
    reader's loss has ``balance_weight`` times their balance loss, and ``balance`` and ``dropped``
    are its two figures (`experts.balance`) as sums. Neither loss has a gradient for the other
    model, so one backward pass of the total serves both.
    """
    trains_retriever = config.retriever_training != "fixed"
    distil = LOSSES[distillation.loss]

    def loss_sums(
        trainable: Params, frozen: Params, source: Any, batch: Batch, key: Array
    ) -> tuple[Array, Any]:
        params = merge(trainable, frozen)
        reader_key, query_key, passage_key = jax.random.split(key, 3)
        query_be = embed_query(models.retriever, params, batch)
        passages = retrieve(source, jax.lax.stop_gradient(query_be), batch)
        if config.rerank > 0:
            towers = models.retriever, params["retriever"]
            rows = config.packed_share(config.packed_passages, config.rerank)
            passages = rerank(*towers, query_be, passages, config.k, rows)
        keys = (reader_key, query_key, passage_key)
        parts = [
            read(trainable, frozen, *part, keys)
            for part in _parts(config.reads, query_be, batch, passages)
        ]
        total, sums = jax.tree.map(lambda *x: sum(x), *parts)
        counts = {p: {**sums[p], "count": jnp.maximum(sums[p]["count"], 1)} for p in PARTS}
        return total, sums | counts

    def read(
        trainable: Params,
        frozen: Params,
        query_be: Array,
        batch: Batch,
        passages: Passages,
        keys: tuple[Array, Array, Array],
    ) -> tuple[Array, Any]:
        """Loss and sums of some rows, all of which read the same number of passages."""
        reader_key, query_key, passage_key = keys
        params = merge(trainable, frozen)
        tokens_bkl = inputs.join_inputs(
            batch.query_tokens_bq,
            inputs.hide(passages.reader_tokens_bkl, passages.rows_bk, batch.hidden_b3),
            passages.mask_bk,
            config.reader_length,
            EOS_ID,
            models.reader.config.block_start,
        )
        tokens_bkl = inputs.behind_prompt(models.reader, params["reader"], tokens_bkl)

        def loss(trained: Any, given: Inputs, embedded: Any = None) -> tuple[Array, Any]:
            trainable, query_be = trained
            params, scores_bk = merge(trainable, frozen), None
            if trains_retriever:
                scores_bk = _retriever_scores(
                    models, params["retriever"], query_be, batch, passages, embedded, query_key,
                    passage_key,
                )  # fmt: skip
            sums = reader_sums(params["reader"], given, scores_bk, batch, passages, reader_key)
            packs = isinstance(given, Packed) or isinstance(embedded, Packed)
            total = sums["reader"]["loss"] + sums["retriever"]["loss"]
            return total, sums | {"packed": jnp.float32(packs)}

        parts = [(tokens_bkl, config.packed_rows)]
        known = config.retriever_training == "query_side" and passages.embeddings_bke is not None
        if trains_retriever and not known:
            assert passages.retriever_tokens_bkm is not None
            tokens_bkm = passages.retriever_tokens_bkm.astype(jnp.int32)
            parts.append((tokens_bkm, config.packed_passages))
        elif models.retriever.config.dropout_rate == 0:  # no tower runs again
            trainable = {**trainable, "retriever": {}}
        return packed_or_padded_loss(loss, (trainable, query_be), *parts)

    def reader_sums(
        params: Params,
        given: Inputs,
        scores_bk: Array | None,
        batch: Batch,
        passages: Passages,
        key: Array,
    ) -> Any:
        """What the reader makes of its inputs, and what that teaches the retriever's scores."""
        targets_bt = jnp.where(batch.weight_b[:, None] > 0, batch.target_tokens_bt, 0)
        decoder_bt, targets_bt = inputs.join_prompt(batch.taught_prompt_bp, targets_bt)
        model, apart = models.reader, passages.apart_bkf
        varies, routed = model.config.varies, Routed() if model.config.num_experts else None
        encoder_key, decoder_key = jax.random.split(key) if varies else (None, None)
        enc = fid.encode(model, params, given, encoder_key, apart, routed)
        logp_bt = fid.fused_logprobs(
            model, params, enc, given, targets_bt, decoder_key, decoder_bt, routed
        )
        sums: Any = {
            "reader": _reader_sums(model.config, logp_bt, targets_bt, routed),
            "retriever": {"loss": jnp.zeros(()), "count": jnp.zeros(())},
        }
        if scores_bk is None:
            return sums
        # Gold scores are those of inference; where it is the same, the encoder's output is reused.
        gold_params, gold_enc = jax.lax.stop_gradient((params, enc))
        if varies:
            gold_enc = fid.encode(model, gold_params, given, apart_bkf=apart)
        signals = _signals(
            models, gold_params, gold_enc, given, targets_bt, decoder_bt,
            scores_bk=scores_bk, mask_bk=passages.mask_bk, weight_b=batch.weight_b,
        )  # fmt: skip
        distil_sum, rows = distil(signals, distillation)
        sums["retriever"] = {"loss": distil_sum, "count": rows}
        return sums

    return loss_sums


def _reader_sums(
    config: ReaderConfig, logp_bt: Array, targets_bt: Array, routed: Routed | None
) -> dict[str, Array]:
    """The reader's loss and count, and what its routers did; all as sums over target tokens."""
    loss, tokens = fid.summed_loss(logp_bt, targets_bt)
    if not routed:
        return {"loss": loss, "count": tokens}
    uneven, dropped = (figure * tokens for figure in balance(routed))
    loss = loss + config.balance_weight * uneven
    return {"loss": loss, "count": tokens, "balance": uneven, "dropped": dropped}


def _parts(
    reads: Sequence[tuple[int, int]], query_be: Array, batch: Batch, passages: Passages
) -> Iterator[tuple[Array, Batch, Passages]]:
    """Groups of rows of a batch, each with the number of passages that it reads."""
    if not reads:
        yield query_be, batch, passages
        return
    first = 0
    if sum(rows for rows, _ in reads) != len(query_be):
        raise UserError(
            f"StepConfig.reads = {reads} gives {sum(rows for rows, _ in reads)} rows something "
            f"to read, but the batch has {len(query_be)}"
        )
    for rows, k in reads:
        some = slice(first, first + rows)
        first += rows
        mine: Any = jax.tree.map(lambda x, some=some: x[some], (query_be, batch))
        found = jax.tree.map(lambda x, some=some, k=k: x[some, :k], passages)
        yield (*mine, found)


def _retriever_scores(
    models: Models,
    params: Params,
    query_be: Array,
    batch: Batch,
    passages: Passages,
    embedded: Inputs | None,
    query_key: Array,
    passage_key: Array | None,
) -> Array:
    """s_bk = q.p / sqrt(e), with gradient for every tower that is trained.

    ``embedded``: what the passage tower reads; None = the index's embeddings are taken.
    """
    if models.retriever.config.dropout_rate > 0:
        query_be = embed(
            models.retriever, params, "embed_query", batch.retriever_tokens_br, query_key
        )
    else:
        passage_key = None
    if embedded is None:
        # The passage tower does not change, so these are exact up to the rounding of the index.
        assert passages.embeddings_bke is not None
        passage_bke = passages.embeddings_bke.astype(query_be.dtype)
    else:
        passage_bke = embed_passages(models.retriever, params, embedded, passage_key)
    return jnp.einsum("be,bke->bk", query_be, passage_bke) / jnp.sqrt(query_be.shape[-1])


def _signals(
    models: Models,
    params: Params,
    enc: Array,
    given: Inputs,
    targets_bt: Array,
    decoder_bt: Array,
    **of_retriever: Array,
) -> Signals:
    """The reader's signals for a batch; ``params`` and ``enc`` carry no gradient.

    ``decoder_bt`` is the decoder's input: the targets, after their prompt (`inputs.join_prompt`).
    """
    reader_args = (models.reader, params, enc, given, targets_bt)

    def passage_logprobs(temperature: float) -> Array:
        return fid.passage_logprobs(*reader_args, temperature, decoder_bt=decoder_bt)

    return Signals(
        passage_logprobs=passage_logprobs,
        leave_one_out_logprobs=lambda: fid.leave_one_out_logprobs(
            *reader_args, decoder_bt=decoder_bt
        ),
        cross_attention_mass=lambda: fid.cross_attention_mass(*reader_args, decoder_bt=decoder_bt),
        num_decoder_layers=models.reader.config.num_decoder_layers,
        targets_bt=targets_bt,
        **of_retriever,
    )
