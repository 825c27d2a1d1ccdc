"""A pointer-generator output: each token is copied from the source, or taken from the vocabulary.

    p(y) = g softmax(vocabulary)(y) + (1 - g) sum of a(s) over source positions s that hold y

g is a sigmoid of the decoder state (See et al. 2017, arXiv 1704.04368). The pointer a has logits of
its own. Terms are added to them for "continue with the token after the one copied last". If the
token before s was written last, the logit rises by a learned amount. A second learned amount is
multiplied with the probability that the pointer had at that token. So a span of several tokens must
be found only once.

Where a copied span ends is decided by what stands next to it: a full stop, a bracket, the next
label. With ReaderConfig.pointer_ends each source position has a learned amount e(s), by which the
log-odds of the vocabulary (and so of the end token) rise if s is the place after the token that was
copied last. Without it the gate has to guess this from the decoder state.

    decoder/pointer/{query,key}/kernel, decoder/pointer/{gate,go_on,ends}/{kernel,bias}
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from atlas_jax.core.layers import Dense
from atlas_jax.core.types import PAD_ID, Array
from atlas_jax.reader.config import ReaderConfig

NEVER = -1e9
_TERMS = 3  # of continuing: one equal token, two equal tokens, where the pointer was


@flax.struct.dataclass
class Pointed:
    """A source that may be copied from.

    Attributes:
      tokens_bs: int32 tokens that may be copied; 0 elsewhere.
      keys_bsd: the pointer's keys.
      ends_bs: float32, how likely a copied span ends before a position; None without
        `pointer_ends`.
    """

    tokens_bs: Array
    keys_bsd: Array
    ends_bs: Array | None = None


@flax.struct.dataclass
class PointerState:
    """What the pointer carries from step to step of cached decoding; n = b * r.

    Attributes:
      before_n: the token before the one that is fed next; 0 at the beginning.
      logits_ns: the last position's pointer logits.
    """

    before_n: Array
    logits_ns: Array


class Pointer(nn.Module):
    """Logits over source positions, and the share of the vocabulary."""

    config: ReaderConfig

    def setup(self) -> None:
        """Create query, key, gate and the weights of continuing."""
        cfg = self.config
        self.query = Dense(cfg.emb_dim, ("embed", "joined_kv"), dtype=cfg.compute_dtype)
        self.key = Dense(cfg.emb_dim, ("embed", "joined_kv"), dtype=cfg.compute_dtype)
        self.gate = Dense(1, ("embed", "unsharded"), use_bias=True)
        self.go_on = Dense(_TERMS, ("embed", "unsharded"), use_bias=True)
        if cfg.pointer_ends:
            self.ends = Dense(1, ("embed", "unsharded"), use_bias=True)

    def source(self, enc_bsd: Float[Array, "b s d"], tokens_bs: Int[Array, "b s"]) -> Pointed:
        """Keys of a source; ``tokens_bs`` is 0 where nothing may be copied."""
        ends_bs = None
        if self.config.pointer_ends:
            ends_bs = self.ends(enc_bsd)[..., 0].astype(jnp.float32)
        return Pointed(tokens_bs, self.key(enc_bsd), ends_bs)

    def __call__(
        self,
        states_brtd: Float[Array, "b r t d"],
        inputs_brt: Int[Array, "b r t"],
        source: Pointed,
        mask_brs: Bool[Array, "b r s"],
    ) -> tuple[Float[Array, "b r t s"], Float[Array, "b r t"]]:
        """Log-probabilities of whole targets.

        Args:
          states_brtd: decoder states.
          inputs_brt: the decoder's input; at position t it is the token before target t.
          source: see above.
          mask_brs: bool, the source positions that each variant may read.

        Returns:
          float32 log a, [b, r, t, s], and the log-odds of the vocabulary, [b, r, t].
        """
        first = PointerState(
            before_n=jnp.zeros(inputs_brt.shape[:2], jnp.int32),
            logits_ns=jnp.zeros(mask_brs.shape, jnp.float32),
        )
        logits, odds_brt = self._over(states_brtd, inputs_brt, first, source, mask_brs, 1)
        return jax.nn.log_softmax(logits, axis=-1), odds_brt

    def step(
        self,
        states_nwd: Float[Array, "n w d"],
        tokens_nw: Int[Array, "n w"],
        last: PointerState,
        source: Pointed,
        mask_bs: Bool[Array, "b s"],
    ) -> tuple[Float[Array, "n w s"], Float[Array, "n w"], PointerState]:
        """The next w positions, as `__call__`.

        Returns:
          Log a [n, w, s], the log-odds [n, w], and the states [n, w] and [n, w, s] after each.
        """
        b, s = source.tokens_bs.shape
        n, w = tokens_nw.shape
        r = n // b  # variants of one source
        logits, odds_brw = self._over(
            states_nwd.reshape(b, r, w, -1),
            tokens_nw.reshape(b, r, w),
            PointerState(last.before_n.reshape(b, r), last.logits_ns.reshape(b, r, s)),
            source,
            jnp.broadcast_to(mask_bs[:, None], (b, r, s)),
            w,
        )
        logits_nws = logits.reshape(n, w, s)  # variants become rows again
        log_pointer = jax.nn.log_softmax(logits_nws, axis=-1)
        return log_pointer, odds_brw.reshape(n, w), PointerState(tokens_nw, logits_nws)

    def _over(
        self,
        states_brtd: jax.Array,
        inputs_brt: jax.Array,
        last: PointerState,
        source: Pointed,
        mask_brs: jax.Array,
        unroll: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Logits [b, r, t, s] and log-odds [b, r, t] of positions after ``last`` ([b, r, ...])."""
        may_brs = mask_brs & (source.tokens_bs != PAD_ID)[:, None]
        base = jnp.einsum(
            "brtd,bsd->brts",
            self.query(states_brtd),
            source.keys_bsd,
            preferred_element_type=jnp.float32,
        ) * (self.config.emb_dim**-0.5)
        before = jnp.concatenate([last.before_n[..., None], inputs_brt[..., :-1]], axis=-1)
        inputs: Any = (base, inputs_brt, before, self.go_on(states_brtd))

        def step(last_brs: jax.Array, now: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            base, token, before, weights = now
            tokens_b1s = source.tokens_bs[:, None]
            logits, next_brs = _gone_on(base, token, before, weights, last_brs, tokens_b1s, may_brs)
            return logits, (logits, _at(next_brs, ends_b1s))

        ends_b1s = None if source.ends_bs is None else source.ends_bs[:, None]
        over_t = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), inputs)
        _, over_t = jax.lax.scan(step, last.logits_ns, over_t, unroll=unroll)
        logits, ends_brt = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), over_t)
        return logits, self._odds(states_brtd, may_brs[:, :, None], ends_brt)

    def _odds(self, states: jax.Array, may: jax.Array, ends: jax.Array) -> jax.Array:
        """Log-odds of the vocabulary; it gets everything where nothing may be copied."""
        odds = self.gate(states)[..., 0].astype(jnp.float32) + ends
        return jnp.where(jnp.any(may, axis=-1), odds, 1e4)


def _at(next_s: jax.Array, ends_s: jax.Array | None) -> jax.Array:
    """How likely the span ends now: `ends_s` [..., s] where the pointer would go on, [...]."""
    if ends_s is None:
        return jnp.zeros(next_s.shape[:-1], jnp.float32)
    return jnp.sum(next_s * ends_s, axis=-1)


def _gone_on(
    base: jax.Array,
    token: jax.Array,
    before: jax.Array,
    weights: jax.Array,
    last: jax.Array,
    source: jax.Array,
    may: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Logits [..., s] with the terms of continuing; ``last`` are those of the step before.

    Also how likely each position is the one after the token that was copied last, [..., s].
    """
    hit = (source == token[..., None]) & may
    twice = hit & _next(source == before[..., None]) & (before != PAD_ID)[..., None]
    stood = jax.nn.softmax(jnp.where(hit, last, NEVER), axis=-1) * hit.astype(jnp.float32)
    terms = (hit.astype(jnp.float32), twice.astype(jnp.float32), stood)
    weights = weights.astype(jnp.float32)
    for i, term in enumerate(terms):
        base = base + weights[..., i : i + 1] * _next(term)
    return jnp.where(may, base, NEVER), _next(stood)


def _next(x: jax.Array) -> jax.Array:
    """Each entry one place later along the last axis."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 0)])[..., :-1]


def log_mixture(
    log_vocabulary: Float[Array, "*any"],
    log_pointer: Float[Array, "*any"],
    odds: Float[Array, "*#any"],
) -> Float[Array, "*any"]:
    """log(g v + (1 - g) a) of two log-probabilities and the log-odds of g, elementwise."""
    return jnp.logaddexp(
        jax.nn.log_sigmoid(odds) + log_vocabulary, jax.nn.log_sigmoid(-odds) + log_pointer
    )


def at_targets(
    log_pointer: Float[Array, "b r t s"],
    tokens_bs: Int[Array, "b s"],
    targets_brt: Int[Array, "b r t"],
) -> Float[Array, "b r t"]:
    """Log-probability that the pointer [b, r, t, s] gives to each target, [b, r, t]."""
    here = tokens_bs[:, None, None, :] == targets_brt[..., None]
    kept = jnp.where(here, log_pointer, NEVER)
    return jax.nn.logsumexp(kept, axis=-1)


def over_vocabulary(
    log_pointer: Float[Array, "b x s"], tokens_bs: Int[Array, "b s"], size: int
) -> Float[Array, "b x {size}"]:
    """Log-probability that the pointer [b, x, s] gives to each token, [b, x, v]."""

    def row(probs_xs: jax.Array, tokens_s: jax.Array) -> jax.Array:
        return jnp.zeros((probs_xs.shape[0], size), jnp.float32).at[:, tokens_s].add(probs_xs)

    probs = jax.vmap(row)(jnp.exp(log_pointer), tokens_bs)
    return jnp.log(jnp.maximum(probs, 1e-30))
