"""The losses of one step: the reader's, and the one that teaches the retriever."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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

    ``sums[part]`` holds ``loss`` (a sum) and ``count`` (what to divide it by: target
    tokens for the reader). The reader's loss has no gradient for the retriever and the
    other way round, so one backward pass of the total serves both.
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
        targets_bt = jnp.where(batch.weight_b[:, None] > 0, batch.target_tokens_bt, 0)
        decoder_bt, targets_bt = fid.join_prompt(batch.taught_prompt_bp, targets_bt)
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
        signals = _signals(
            models, gold_params, gold_enc_bkld, tokens_bkl, targets_bt, decoder_bt,
            scores_bk=scores_bk, mask_bk=passages.mask_bk, weight_b=batch.weight_b,
        )  # fmt: skip
        distil_sum, rows = distil(signals, distillation)
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


def _signals(
    models: Models,
    params: Params,
    enc_bkld: Array,
    tokens_bkl: Array,
    targets_bt: Array,
    decoder_bt: Array,
    **of_retriever: Array,
) -> Signals:
    """What the reader can be asked of a batch; ``params`` and ``enc_bkld`` carry no gradient.

    ``decoder_bt`` is what the decoder is given, the targets behind their prompt
    (`fid.join_prompt`).
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
