"""The loss of an encoder's pretraining: one function of parameters, key and rows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.core.experts import Routed, balance, routed_apply
from atlas_jax.core.types import PAD_ID, Array, Params
from atlas_jax.encoders.heads import BOUNDARY_PLACES
from atlas_jax.encoders.masking import Masked, MaskingConfig, mask_tokens
from atlas_jax.encoders.model import EncoderModel, EncoderModelConfig
from atlas_jax.encoders.objectives import (
    TokenTables,
    beside_spans,
    generator_config,
    permutation_masks,
    replaced_loss,
    sampled,
    sentence_loss,
    token_loss,
    unified_masks,
    with_tokens,
)
from atlas_jax.training.encoder_state import Metrics
from atlas_jax.training.encoder_texts import EncoderBatch

GENERATOR = "generator"
_SHARED = "embeddings"


@dataclasses.dataclass(frozen=True)
class PretrainingLoss:
    """Callable: (parameters, key, rows) -> (loss, metrics).

    Parameters are those of the encoder and its heads. With 'electra' they also have
    `generator/encoder` and `generator/mlm`. The generator reads the encoder's own embedding tables
    and their norm, as released, so they learn from both.

    Attributes:
      config: of the encoder.
      masking: which tokens are predicted, and what is read in their place.
      tables: of the vocabulary.
      spans: masked tokens are predicted from the boundaries of their spans, too (SpanBERT).
      unified: masked tokens are predicted under UniLM's attention masks, one drawn for each row.
      permuted: the chosen tokens are predicted in a random order by an XLNet's query stream.
      pairs: 'nsp', 'sop' or ''; with one of them the sentence head learns.
      electra: the encoder says which tokens were replaced; the generator predicts masked ones.
      generator_share, replaced_weight: as in `EncoderTrainConfig`.
      deterministic: leave dropout out.
    """

    config: EncoderModelConfig
    masking: MaskingConfig
    tables: TokenTables
    pairs: str = ""
    electra: bool = False
    generator_share: float = 0.25
    replaced_weight: float = 50.0
    spans: bool = False
    unified: bool = False
    permuted: bool = False
    deterministic: bool = False

    def __call__(
        self, params: Params, key: jax.Array, batch: EncoderBatch
    ) -> tuple[Array, Metrics]:
        """The loss of a batch: what is asked of MLM + spans + sentences + 50 x replaced.

        Switch layers of the encoder add `balance_weight` times their balance loss.
        """
        mask_key, sample_key, dropout_key, other_key = jax.random.split(key, 4)
        masked = self._masked(batch.tokens_bl, mask_key)
        model: Any = EncoderModel(self.config)
        if self.permuted:
            return self._permuted(model, params, masked, batch, sample_key, dropout_key)
        routed: Routed = []
        if not self.electra:
            states_bld = self._states(model, params, masked.tokens_bl, batch, dropout_key, routed)
            loss, metrics, _ = self._tokens(model, params, states_bld, masked)
        else:
            loss, metrics, states_bld = self._replaced(
                model, params, masked, batch, sample_key, dropout_key, other_key, routed
            )
        if routed:
            own, dropped = balance(routed)
            tower: Any = self.config.tower
            loss = loss + tower.balance_weight * own
            metrics |= {"balance_loss": own, "dropped_share": dropped}
        if self.spans:
            own, accuracy = self._boundaries(model, params, states_bld, masked)
            loss = loss + own
            metrics |= {"sbo_loss": own, "sbo_accuracy": accuracy}
        if self.pairs:
            logits_bc = model.apply(
                {"params": params}, states_bld, self.deterministic, method="sentence_logits",
                rngs={"dropout": jax.random.fold_in(dropout_key, 1)},
            )  # fmt: skip
            own, accuracy = sentence_loss(logits_bc, batch.labels_b)
            loss = loss + own
            metrics |= {f"{self.pairs}_loss": own, f"{self.pairs}_accuracy": accuracy}
        return loss, metrics

    def _masked(self, tokens_bl: jax.Array, key: jax.Array) -> Masked:
        starts_v, special_v = jnp.asarray(self.tables.starts_v), jnp.asarray(self.tables.special_v)
        return mask_tokens(
            self.masking, tokens_bl, starts_v[tokens_bl], special_v[tokens_bl], key,
            self.tables.mask_id, len(self.tables.starts_v),
        )  # fmt: skip

    def _states(
        self, model: Any, params: Params, tokens_bl: jax.Array, batch: EncoderBatch,
        key: jax.Array, routed: Routed,
    ) -> jax.Array:  # fmt: skip
        more = {"types_bl": batch.types_bl} if self.pairs else {}
        if self.unified:
            own = jax.random.fold_in(key, 2)
            more["mask"] = unified_masks(own, jnp.asarray(batch.tokens_bl) != PAD_ID)
        switches = model.config.tower.num_experts > 0
        states_bld: jax.Array = routed_apply(
            model.apply, routed if switches else None, jnp.asarray(tokens_bl) != PAD_ID,
            {"params": params}, tokens_bl, self.deterministic, method="states",
            rngs={"dropout": key}, **more,
        )  # fmt: skip
        return states_bld

    def _tokens(
        self, model: Any, params: Params, states_bld: jax.Array, masked: Masked
    ) -> tuple[Array, Metrics, jax.Array]:
        """The MLM's loss, its metrics, and its logits [b, p, v]."""
        chosen_bpd = jnp.take_along_axis(states_bld, masked.positions_bp[..., None], axis=1)
        logits_bpv = model.apply({"params": params}, chosen_bpd, method="token_logits")
        loss, accuracy = token_loss(logits_bpv, masked.labels_bp, masked.weights_bp)
        return loss, {"mlm_loss": loss, "mlm_accuracy": accuracy}, logits_bpv

    def _permuted(
        self, model: Any, params: Params, masked: Masked, batch: EncoderBatch,
        order_key: jax.Array, dropout_key: jax.Array,
    ) -> tuple[Array, Metrics]:  # fmt: skip
        """XLNet's loss and its metrics; the tokens themselves are read, not their masks."""
        real_bl = jnp.asarray(batch.tokens_bl) != PAD_ID
        content_bll, query_bpl = permutation_masks(
            order_key, real_bl, masked.positions_bp, masked.weights_bp
        )
        states_bpd = model.apply(
            {"params": params}, batch.tokens_bl, self.deterministic, method="predicted",
            positions_bp=masked.positions_bp, content_bll=content_bll, query_bpl=query_bpl,
            rngs={"dropout": dropout_key},
        )  # fmt: skip
        logits_bpv = model.apply({"params": params}, states_bpd, method="permuted_logits")
        loss, accuracy = token_loss(logits_bpv, masked.labels_bp, masked.weights_bp)
        return loss, {"plm_loss": loss, "plm_accuracy": accuracy}

    def _boundaries(
        self, model: Any, params: Params, states_bld: jax.Array, masked: Masked
    ) -> tuple[Array, Array]:
        """The boundary objective's loss and accuracy; tokens beyond the 20th of a span are none."""
        left_bl, right_bl = beside_spans(masked.run_bl >= 0)
        left_bp, right_bp = (
            jnp.take_along_axis(side_bl, masked.positions_bp, axis=1)
            for side_bl in (left_bl, right_bl)
        )
        places_bp = masked.positions_bp - left_bp - 1
        near_bp = (places_bp >= 0) & (places_bp < BOUNDARY_PLACES)
        beside = (
            jnp.take_along_axis(states_bld, side_bp[..., None], axis=1)
            for side_bp in (left_bp, right_bp)
        )
        logits_bpv = model.apply(
            {"params": params}, *beside, jnp.clip(places_bp, 0, BOUNDARY_PLACES - 1),
            method="boundary_logits",
        )  # fmt: skip
        weights_bp = masked.weights_bp * near_bp.astype(jnp.float32)
        return token_loss(logits_bpv, masked.labels_bp, weights_bp)

    def _replaced(
        self, model: Any, params: Params, masked: Masked, batch: EncoderBatch,
        sample_key: jax.Array, dropout_key: jax.Array, other_key: jax.Array, routed: Routed,
    ) -> tuple[Array, Metrics, jax.Array]:  # fmt: skip
        """ELECTRA's loss, its metrics, and the discriminator's states."""
        generator: Any = EncoderModel(generator_config(self.config, self.generator_share))
        small = generator_params(params)
        states_bld = self._states(generator, small, masked.tokens_bl, batch, other_key, routed)
        loss, metrics, logits_bpv = self._tokens(generator, small, states_bld, masked)
        new_bp = sampled(sample_key, logits_bpv)
        tokens_bl = with_tokens(batch.tokens_bl, masked.positions_bp, masked.weights_bp, new_bp)
        replaced_bl = tokens_bl != batch.tokens_bl  # a sample that hits the original is real
        states_bld = self._states(model, params, tokens_bl, batch, dropout_key, routed)
        logits_bl = model.apply({"params": params}, states_bld, method="replaced_logits")
        own, accuracy = replaced_loss(logits_bl, replaced_bl, batch.tokens_bl != PAD_ID)
        metrics |= {"replaced_loss": own, "replaced_accuracy": accuracy}
        return loss + self.replaced_weight * own, metrics, states_bld


def generator_params(params: Params) -> Params:
    """The whole generator: its own parameters and the embeddings that it shares."""
    own = params[GENERATOR]
    tables = params["encoder"][_SHARED]
    return {**own, "encoder": {**own["encoder"], _SHARED: tables}}


def own_of_generator(params: Params) -> Params:
    """What a whole generator has for itself: the inverse of `generator_params`."""
    encoder = {name: value for name, value in params["encoder"].items() if name != _SHARED}
    return {**params, "encoder": encoder}


def tables_of(starts_v: np.ndarray, special_ids: tuple[int, ...], mask_id: int) -> TokenTables:
    """The tables of a vocabulary whose special tokens have these ids."""
    special_v = np.zeros(len(starts_v), bool)
    special_v[list(special_ids)] = True
    return TokenTables(starts_v, special_v, mask_id)
