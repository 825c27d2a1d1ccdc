"""LOOP, leave-one-out perplexity distillation: how much is each passage missed?"""

import jax
from jaxtyping import Float, Int

from atlas_jax.core.types import Array
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.distillation.kl import distill_loss, mean_over_targets
from atlas_jax.distillation.signals import Signals


def gold_scores(
    leave_one_out_logp_bkt: Float[Array, "b k t"], targets_bt: Int[Array, "b t"]
) -> Float[Array, "b k"]:
    """g_ij = mean over target tokens of the negative log likelihood without passage j.

    Args:
        leave_one_out_logp_bkt: Log likelihood of each target token when passage j is masked
            out of the cross-attention and the others stay.
        targets_bt: Target tokens, pad 0.

    Returns:
        float32 [b, k], higher when the passage was needed; gradient stopped.
    """
    return jax.lax.stop_gradient(-mean_over_targets(leave_one_out_logp_bkt, targets_bt))


def distil(
    signals: Signals, config: DistillationConfig
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The loss as (sum, count): `kl.distill_loss` of these gold scores."""
    gold_bk = gold_scores(signals.leave_one_out_logprobs(), signals.targets_bt)
    return distill_loss(gold_bk, signals.scores_bk, signals.mask_bk, signals.weight_b, config)
