"""PDist, perplexity distillation: how likely is the target from each passage alone?"""

import jax

from atlas_jax.distillation.kl import mean_over_targets


def gold_scores(logp_bkt: jax.Array, targets_bt: jax.Array) -> jax.Array:
    """g_ij = mean over target tokens of log p(y_t | y_<t, passage j alone).

    Args:
        logp_bkt: Log likelihood of each target token, one reader pass per passage.
        targets_bt: Target tokens, pad 0.

    Returns:
        float32 [b, k], gradient stopped.
    """
    return jax.lax.stop_gradient(mean_over_targets(logp_bkt, targets_bt))
