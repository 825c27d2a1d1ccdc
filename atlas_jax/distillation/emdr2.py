"""EMDR2, end-to-end multi-document reader and retriever: the likelihood over all passages."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from atlas_jax.core.types import Array
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.distillation.kl import retriever_log_probs, valid_targets
from atlas_jax.distillation.signals import Signals


def loss(
    logp_bkt: Float[Array, "b k t"],
    retriever_scores_bk: Float[Array, "b k"],
    targets_bt: Int[Array, "b t"],
    mask_bk: Bool[Array, "b k"],
    weight_b: Float[Array, " b"],
    config: DistillationConfig,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """- sum over rows and target tokens of logsumexp_j(l_ijt + log p_retr(j)).

    The sum over passages is taken for each target token, as the released code does. The paper
    takes it for the whole answer: log sum_k p(a | q, d_k) p_retr(d_k | q). The reader gets no
    gradient.

    Args:
        logp_bkt: l_ijt = log_softmax(logits / T_gold)[y_t] of passage j alone. The
            temperature divides the logits, so it belongs to the caller.
        retriever_scores_bk: s = q.p / sqrt(e), before T_score.
        targets_bt: Target tokens, pad 0.
        mask_bk: bool, True where the passage is real; others get probability zero.
        weight_b: float, 1 for a real row, 0 for a padding row.
        config: Gives T_score.

    Returns:
        (summed negative log likelihood, number of target tokens of real rows that have a
        passage), two float32 scalars; their ratio is the released loss.
    """
    logp_bkt = jax.lax.stop_gradient(logp_bkt.astype(jnp.float32))
    mask_bk1 = mask_bk[:, :, None]
    log_q_bk1 = retriever_log_probs(retriever_scores_bk, mask_bk, config)[:, :, None]
    any_b = jnp.any(mask_bk, axis=-1)
    # A row without passages would be log(0), whose gradient is not a number. It sums over its
    # masked passages here, which is finite, and gets no weight below.
    summed_bk1 = mask_bk1 | ~any_b[:, None, None]
    joint_bkt = jnp.where(mask_bk1, logp_bkt + log_q_bk1, 0.0)
    marginal_bt = jax.nn.logsumexp(joint_bkt, axis=1, where=summed_bk1)
    used_b1 = jnp.where(any_b, weight_b, 0.0)[:, None]
    counted_bt = jnp.where(valid_targets(targets_bt), used_b1, 0.0)
    marginal_bt = jnp.where(counted_bt > 0, marginal_bt, 0.0)
    return -jnp.sum(marginal_bt * counted_bt), jnp.sum(counted_bt)


def distil(
    signals: Signals, config: DistillationConfig
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The loss as (sum, count), of the reader's likelihoods at T_gold."""
    return loss(
        signals.passage_logprobs(config.gold_temperature),
        signals.scores_bk,
        signals.targets_bt,
        signals.mask_bk,
        signals.weight_b,
        config,
    )
