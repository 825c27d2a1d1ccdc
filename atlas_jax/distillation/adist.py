"""ADist, attention distillation: how much does the reader draw from each passage?"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from atlas_jax.core.errors import UserError
from atlas_jax.core.types import Array
from atlas_jax.distillation.config import ADIST_NORMALIZERS, DistillationConfig
from atlas_jax.distillation.kl import distill_loss, valid_targets
from atlas_jax.distillation.signals import Signals

RELEASED_CONSTANT = 256.0  # the released code uses this as the length of every passage


def gold_scores(
    mass_bk: Float[Array, "b k"],
    targets_bt: Int[Array, "b t"],
    num_layers: int,
    normalizer: str = "released",
) -> Float[Array, "b k"]:
    """g_ij = attention mass / (256 x layers x target tokens), or without the 256.

    Args:
        mass_bk: Cross-attention probability (normalised over all k x l positions) times the L2
            norm of the value vector. The mean over heads; the sum over layers, real target tokens
            and the passage's real tokens.
        targets_bt: Target tokens, pad 0.
        num_layers: Decoder layers.
        normalizer: 'released' divides by 256 x layers x target tokens, 'target' by
            layers x target tokens.

    Returns:
        float32 [b, k], gradient stopped.

    Raises:
        UserError: Unknown normalizer.
    """
    if normalizer not in ADIST_NORMALIZERS:
        raise UserError(
            f"adist normalizer {normalizer!r}: must be one of {', '.join(ADIST_NORMALIZERS)}"
        )
    constant = RELEASED_CONSTANT if normalizer == "released" else 1.0
    valid_bt = valid_targets(targets_bt)
    tokens_b1 = jnp.maximum(jnp.sum(valid_bt, axis=-1, keepdims=True, dtype=jnp.float32), 1)
    scores_bk = mass_bk.astype(jnp.float32) / (constant * num_layers * tokens_b1)
    return jax.lax.stop_gradient(scores_bk)


def distil(
    signals: Signals, config: DistillationConfig
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The loss as (sum, count): `kl.distill_loss` of these gold scores."""
    gold_bk = gold_scores(
        signals.cross_attention_mass(),
        signals.targets_bt,
        signals.num_decoder_layers,
        config.adist_normalizer,
    )
    return distill_loss(gold_bk, signals.scores_bk, signals.mask_bk, signals.weight_b, config)
