"""The losses of one step: the reader's, and the one that teaches the retriever."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from atlas_jax.core.errors import UserError
from atlas_jax.core.parts import PARTS
from atlas_jax.core.types import EOS_ID, Array, Batch, Params, Passages
from atlas_jax.corpus.retrieval import Retrieve, rerank
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.distillation.signals import Signals
from atlas_jax.distillation.table import LOSSES
from atlas_jax.models.parameters import Models
from atlas_jax.models.towers import embed, embed_query
from atlas_jax.reader import fid
from atlas_jax.training.config import StepConfig
from atlas_jax.training.state import merge


def make_loss_sums(
    models: Models, config: StepConfig, distillation: DistillationConfig, retrieve: Retrieve
) -> Callable[..., tuple[Array, Any]]:
    """Build ``loss_sums(trainable, frozen, source, batch, key) -> (total, sums)``.

    ``sums[part]`` holds ``loss`` (a sum) and ``count`` (its divisor; for the reader the number of
    target tokens). Neither loss has a gradient for the other model, so one backward pass of the
    total serves both.
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
        if config.rerank:
            passages = rerank(models.retriever, params["retriever"], query_be, passages, config.k)
        keys = (reader_key, query_key, passage_key)
        parts = [
            read(params, *part, keys) for part in _parts(config.reads, query_be, batch, passages)
        ]
        sums = jax.tree.map(lambda *x: sum(x), *parts)
        total = sums["reader"]["loss"] + sums["retriever"]["loss"]
        return total, {p: {**sums[p], "count": jnp.maximum(sums[p]["count"], 1)} for p in PARTS}

    def read(
        params: Params,
        query_be: Array,
        batch: Batch,
        passages: Passages,
        keys: tuple[Array, Array, Array],
    ) -> Any:
        """The sums of some rows, all of which read the same number of passages."""
        reader_key, query_key, passage_key = keys
        targets_bt = jnp.where(batch.weight_b[:, None] > 0, batch.target_tokens_bt, 0)
        decoder_bt, targets_bt = fid.join_prompt(batch.taught_prompt_bp, targets_bt)
        tokens_bkl = fid.join_inputs(
            batch.query_tokens_bq,
            fid.hide(passages.reader_tokens_bkl, passages.rows_bk, batch.hidden_b3),
            passages.mask_bk,
            config.reader_length,
            EOS_ID,
            models.reader.config.block_start,
        )
        tokens_bkl = fid.behind_prompt(models.reader, params["reader"], tokens_bkl)
        has_dropout = models.reader.config.dropout_rate > 0
        encoder_key, decoder_key = jax.random.split(reader_key)
        enc_bkld = fid.encode(
            models.reader,
            params["reader"],
            tokens_bkl,
            encoder_key if has_dropout else None,
            passages.apart_bkf,
        )
        logp_bt = fid.fused_logprobs(
            models.reader,
            params["reader"],
            enc_bkld,
            tokens_bkl,
            targets_bt,
            decoder_key if has_dropout else None,
            decoder_bt,
        )
        reader_sum, tokens = fid.summed_loss(logp_bt, targets_bt)
        sums = {"reader": {"loss": reader_sum, "count": tokens}}
        if not trains_retriever:
            sums["retriever"] = {"loss": jnp.zeros(()), "count": jnp.zeros(())}
            return sums

        scores_bk = _retriever_scores(
            models, config, params["retriever"], query_be, batch, passages, query_key, passage_key
        )
        # Gold scores are taken without dropout; without any, the encoder's output is reused.
        gold_params = jax.lax.stop_gradient(params["reader"])
        gold_enc_bkld = (
            fid.encode(models.reader, gold_params, tokens_bkl, apart_bkf=passages.apart_bkf)
            if has_dropout
            else jax.lax.stop_gradient(enc_bkld)
        )
        signals = _signals(
            models, gold_params, gold_enc_bkld, tokens_bkl, targets_bt, decoder_bt,
            scores_bk=scores_bk, mask_bk=passages.mask_bk, weight_b=batch.weight_b,
        )  # fmt: skip
        distil_sum, rows = distil(signals, distillation)
        sums["retriever"] = {"loss": distil_sum, "count": rows}
        return sums

    return loss_sums


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
        # The passage tower does not change, so these are exact up to the rounding of the index.
        passage_bke = passages.embeddings_bke.astype(query_be.dtype)
    else:
        assert passages.retriever_tokens_bkm is not None
        b, k, m = passages.retriever_tokens_bkm.shape
        flat = passages.retriever_tokens_bkm.reshape(b * k, m)  # every passage on its own
        passage_bke = embed(models.retriever, params, "embed_passage", flat, passage_key).reshape(
            b, k, -1
        )
    return jnp.einsum("be,bke->bk", query_be, passage_bke) / jnp.sqrt(query_be.shape[-1])


def _signals(
    models: Models,
    params: Params,
    enc_bkld: Array,
    tokens_bkl: Array,
    targets_bt: Array,
    decoder_bt: Array,
    **of_retriever: Array,
) -> Signals:
    """The reader's signals for a batch; ``params`` and ``enc_bkld`` carry no gradient.

    ``decoder_bt`` is the decoder's input: the targets, after their prompt (`fid.join_prompt`).
    """
    reader_args = (models.reader, params, enc_bkld, tokens_bkl, targets_bt)

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
