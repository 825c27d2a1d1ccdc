"""The divergence between the reader's target distribution and the retriever's.

Losses take arrays, not models, and return a sum and a count, so that shards and
accumulated micro-batches add up to the mean over everything.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from atlas_jax.core.types import Array
from atlas_jax.distillation.config import DistillationConfig


def masked_log_softmax(
    scores_bk: Float[Array, "b k"], mask_bk: Bool[Array, "b k"]
) -> Float[Array, "b k"]:
    """Take log_softmax over the real passages alone.

    Args:
        scores_bk: float32 scores, one row a query; masked entries may be anything, even
            infinite or not a number.
        mask_bk: bool, True where the passage is real.

    Returns:
        float32 log probabilities [b, k]; 0 where masked (a finite stand-in that callers
        mask again), also in rows without any real passage.
    """
    scores_bk = jnp.where(mask_bk, scores_bk.astype(jnp.float32), -jnp.inf)
    highest_b1 = jnp.max(scores_bk, axis=-1, keepdims=True, initial=-jnp.inf)
    # Rows without a passage would compute inf - inf: put any finite number there.
    highest_b1 = jax.lax.stop_gradient(jnp.where(jnp.isfinite(highest_b1), highest_b1, 0.0))
    centred_bk = jnp.where(mask_bk, scores_bk - highest_b1, 0.0)
    total_b1 = jnp.sum(jnp.where(mask_bk, jnp.exp(centred_bk), 0.0), axis=-1, keepdims=True)
    log_total_b1 = jnp.log(jnp.where(total_b1 > 0, total_b1, 1.0))
    return jnp.where(mask_bk, centred_bk - log_total_b1, 0.0)


def retriever_log_probs(
    retriever_scores_bk: Float[Array, "b k"],
    mask_bk: Bool[Array, "b k"],
    config: DistillationConfig,
) -> Float[Array, "b k"]:
    """Return log p_retr(d_k | q) = log_softmax_k(s / T_score) over the real passages.

    Args:
        retriever_scores_bk: s = q.p / sqrt(e), before the temperature.
        mask_bk: bool, True where the passage is real.
        config: Gives T_score.

    Returns:
        float32 [b, k], 0 where masked.
    """
    return masked_log_softmax(retriever_scores_bk / config.score_temperature, mask_bk)


def valid_targets(targets_bt: Int[Array, "b t"]) -> Bool[Array, "b t"]:
    """Return the bool mask [b, t] of real target tokens (pad id 0)."""
    return targets_bt != 0


def mean_over_targets(
    values_bkt: Float[Array, "b k t"], targets_bt: Int[Array, "b t"]
) -> Float[Array, "b k"]:
    """Average values [b, k, t] over each row's real target tokens.

    Returns:
        float32 [b, k]; 0 for a row without target tokens.
    """
    valid_b1t = valid_targets(targets_bt)[:, None, :]
    sum_bk = jnp.sum(jnp.where(valid_b1t, values_bkt.astype(jnp.float32), 0.0), axis=-1)
    return sum_bk / jnp.maximum(jnp.sum(valid_b1t, axis=-1, dtype=jnp.float32), 1)


def distill_loss(
    gold_scores_bk: Float[Array, "b k"],
    retriever_scores_bk: Float[Array, "b k"],
    mask_bk: Bool[Array, "b k"],
    weight_b: Float[Array, " b"],
    config: DistillationConfig,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """KL(softmax(g / T_gold) || softmax(s / T_score)) summed over rows (adist, pdist, loop).

    Gradients flow into `retriever_scores_bk` alone. The two reductions differ in the count:

    * 'batch' counts the real rows that have a passage, so sum / count is the batch mean.
    * 'released' counts their real passages, so sum / count is a mean over rows and passages.
      The released code takes this mean, because it is PyTorch's default.

    Args:
        gold_scores_bk: g, the reader's score of each passage, before T_gold.
        retriever_scores_bk: s = q.p / sqrt(e), before T_score.
        mask_bk: bool, True where the passage is real; others get probability zero.
        weight_b: float, 1 for a real row, 0 for a padding row.
        config: Temperatures and reduction.

    Returns:
        (sum of the rows' divergences, count), two float32 scalars.
    """
    gold_scores_bk = jax.lax.stop_gradient(gold_scores_bk.astype(jnp.float32))
    log_p_bk = masked_log_softmax(gold_scores_bk / config.gold_temperature, mask_bk)
    log_q_bk = retriever_log_probs(retriever_scores_bk, mask_bk, config)
    p_bk = jnp.where(mask_bk, jnp.exp(log_p_bk), 0.0)
    divergence_b = jnp.sum(p_bk * (log_p_bk - log_q_bk), axis=-1)
    passages_b = jnp.sum(mask_bk, axis=-1, dtype=jnp.float32)
    used_b = jnp.where(passages_b > 0, weight_b, 0.0)
    counted_b = used_b * passages_b if config.kl_reduction == "released" else used_b
    return jnp.sum(divergence_b * used_b), jnp.sum(counted_b)
