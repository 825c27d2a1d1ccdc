"""T5 encoder-decoder in linen, with T5X's parameter names and logical axes.

    token_embedder/embedding
    encoder/relpos_bias/rel_embedding
    encoder/layers_0/{pre_attention_layer_norm,attention,pre_mlp_layer_norm,mlp}/...
    encoder/encoder_norm/scale
    decoder/relpos_bias/rel_embedding
    decoder/layers_0/{pre_self_attention_layer_norm,self_attention,
                      pre_cross_attention_layer_norm,encoder_decoder_attention,
                      pre_mlp_layer_norm,mlp}/...
    decoder/decoder_norm/scale
    decoder/logits_dense/kernel           (unless logits_via_embedding)

With ``scan_layers`` the layers are one subtree ``layers`` whose leaves have a leading axis
``layers``; ``stack_layers`` and ``unstack_layers`` convert. The relative-position bias is
computed once per stack in both forms.

The decoder reads ``r`` variants of a target for each source. The keys and values of the source are
computed once. Variants differ in their source mask (leave-one-out passes) or in their tokens
(beams). Plain decoding has one variant.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from atlas_jax.core.adapters import WithPrefixes
from atlas_jax.core.fused import UNREAD, Seen
from atlas_jax.core.layers import Embed, matmul
from atlas_jax.core.partitioning import constrain
from atlas_jax.core.types import PAD_ID, Array
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.pair_encoder import PairEncoder, blocks_of
from atlas_jax.reader.pointer import (
    PointerState,
    at_targets,
    log_mixture,
    over_vocabulary,
)
from atlas_jax.reader.stacks import (
    Decoder,
    DecodingState,
    Encoder,
    mask_source,
    whole_source,
)


class T5(WithPrefixes):
    """The whole reader. Call its methods through ``model.apply(..., method='encode')``."""

    config: ReaderConfig

    def setup(self) -> None:
        """Create the shared embedding and both stacks."""
        cfg = self.config
        self.token_embedder = Embed(cfg.vocab_size, cfg.emb_dim, dtype=cfg.compute_dtype)
        self.encoder = Encoder(cfg) if cfg.encoder == "t5" else PairEncoder(cfg)
        self.decoder = Decoder(cfg)

    def __call__(
        self,
        tokens_nl: Int[Array, "n l"],
        decoder_input_nt: Int[Array, "n t"],
        deterministic: bool = True,
    ) -> Float[Array, "n t v"]:
        """Plain T5: logits of the targets of one source each, float32 [n, t, v]."""
        enc = self.encode(tokens_nl, deterministic)
        copied = copyable(tokens_nl, self.config) if self.config.pointer else None
        return self.decode(enc, tokens_nl > 0, decoder_input_nt, deterministic, copied)

    def encode(
        self,
        tokens_nl: Int[Array, "n l"],
        deterministic: bool = True,
        segments_nl: Int[Array, "n l"] | None = None,
    ) -> Float[Array, "n l d"]:
        """Tokens [n, l] (0 is padding) -> encoder states [n, l, d].

        A pair encoder needs two blocks, as `inputs.join_inputs` makes them. States at padding are
        finite but have no meaning.

        Args:
          segments_nl: number of the text that each token belongs to, if several lie side by side
            in a row; each is encoded as if it were alone. Not for a pair encoder.

        Raises:
          ValueError: segments for a pair encoder.
        """
        x = self._embed(tokens_nl)
        if self.config.encoder == "pair":
            if segments_nl is not None:
                raise ValueError("a pair encoder reads one question and passage a row")
            return self.encoder(x, tokens_nl, deterministic)
        if self.config.attention == "fused":
            segments = jnp.zeros_like(tokens_nl) if segments_nl is None else segments_nl
            segments = jnp.where(tokens_nl > 0, segments, UNREAD)
            return self.encoder(x, Seen(segments, segments), deterministic)
        visible = (tokens_nl > 0)[:, None]
        if segments_nl is not None:
            visible &= segments_nl[:, :, None] == segments_nl[:, None]
        return self.encoder(x, visible, deterministic)

    def encode_apart(self, tokens_nl: Int[Array, "n l"]) -> Float[Array, "n l d"]:
        """States [n, l, d] of single blocks after a pair encoder's lower layers."""
        return self.encoder.apart(self._embed(tokens_nl), tokens_nl)

    def encode_together(
        self,
        apart_nld: Float[Array, "n l d"],
        tokens_nl: Int[Array, "n l"],
        deterministic: bool = True,
    ) -> Float[Array, "n l d"]:
        """The rest of `encode`, for blocks that `encode_apart` has encoded, side by side."""
        words = self._embed(tokens_nl)
        return self.encoder.together(apart_nld, words, tokens_nl, deterministic)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        x = self.token_embedder(tokens)
        return jax.lax.stop_gradient(x) if self.config.encoder == "pair" else x

    def _embed_targets(self, tokens: jax.Array) -> jax.Array:
        x = self._embed(tokens)
        return self.decoder.token_dense(x) if self.config.encoder == "pair" else x

    def decode(
        self,
        enc_bsd: Float[Array, "b s d"],
        enc_mask_bs: Bool[Array, "b s"],
        decoder_input_bt: Int[Array, "b t"],
        deterministic: bool = True,
        source_tokens_bs: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Logits of one target per source, float32 [b, t, v].

        Args:
          enc_bsd: encoder states.
          enc_mask_bs: bool, the states that may be read. A row without any reads zeros.
          decoder_input_bt: targets shifted right; position i sees tokens 0..i.
          deterministic: no dropout; otherwise needs a ``dropout`` rng.
          source_tokens_bs: tokens that may be copied (`copyable`), for a pointer.
        """
        read = (enc_mask_bs[:, None], decoder_input_bt[:, None])
        states, _ = self.decode_states(enc_bsd, *read, deterministic=deterministic)
        if source_tokens_bs is None:
            return self.logits(states[:, 0])
        mixed = self._mixed(self.logits(states), states, enc_bsd, *read, source_tokens_bs)
        return mixed[:, 0]

    def decode_states(
        self,
        enc_bsd: Float[Array, "b s d"],
        enc_mask_brs: Bool[Array, "b r s"],
        decoder_input_brt: Int[Array, "b r t"],
        weight_bt: Shaped[Array, "b t"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "b r t d"], Float[Array, "b s"] | None]:
        """Decoder states of r targets per source, before the vocabulary head.

        Args:
          enc_bsd: encoder states; their keys and values are computed once per layer.
          enc_mask_brs: bool, the source positions each variant may read.
          decoder_input_brt: targets shifted right.
          weight_bt: weights of target positions (1 for real ones); asks for the mass and
            needs r = 1.

        Returns:
          Normed states [b, r, t, d], and with ``weight_bt`` the float32 mass [b, s]: the
          cross-attention probability times the L2 norm of the value, averaged over heads,
          summed over layers and weighted target positions (ADist's score of a source
          position; method of arXiv 2208.03299, section 2.2).
        """
        b, r, t = decoder_input_brt.shape
        if weight_bt is not None and r != 1:
            raise ValueError(f"attention mass is defined for one variant per source, not {r}")
        x = self._embed_targets(decoder_input_brt.reshape(b * r, t))  # variants become rows
        source_mask = whole_source(self.config, enc_mask_brs, t)
        states, mass = self.decoder(x, enc_bsd, source_mask, weight_bt, deterministic)
        return states.reshape(b, r, t, -1), mass

    def logits(self, states: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
        """Decoder states [..., d] -> float32 logits of the vocabulary [..., v]."""
        if self.config.encoder == "pair":
            table_vd = jax.lax.stop_gradient(self.token_embedder.embedding)
            logits = matmul(self.decoder.logits_dense(states), table_vd.T)
        elif self.config.logits_via_embedding:
            logits = self.token_embedder.attend(states) * self.config.emb_dim**-0.5
        else:
            logits = self.decoder.logits_dense(states)
        middle = (None,) * (logits.ndim - 2)
        return constrain(logits, "batch", *middle, "vocab")

    def target_logprobs(
        self,
        states_brtd: Float[Array, "b r t d"],
        targets_brt: Int[Array, "b r t"],
        enc_bsd: Float[Array, "b s d"],
        enc_mask_brs: Bool[Array, "b r s"],
        decoder_input_brt: Int[Array, "b r t"],
        source_tokens_bs: Int[Array, "b s"],
        temperature: float = 1.0,
    ) -> Float[Array, "b r t"]:
        """Log-probability of each target token, float32 [b, r, t].

        Args:
          states_brtd: of `decode_states`, from the same source, mask and input.
          targets_brt: the tokens; ignore the result at padding.
          enc_bsd, enc_mask_brs, decoder_input_brt: as in `decode_states`.
          source_tokens_bs: tokens that may be copied (`copyable`); not used without a pointer.
          temperature: divides the logits. With a pointer it divides the log-probabilities.
        """
        logits = self.logits(states_brtd)
        if not self.config.pointer:
            return pick_logprobs(logits / temperature, targets_brt)
        read = (states_brtd, enc_bsd, enc_mask_brs, decoder_input_brt, source_tokens_bs)
        if temperature != 1.0:  # needs the whole vocabulary
            return pick_logprobs(self._mixed(logits, *read) / temperature, targets_brt)
        log_pointer, odds = self._point(*read)
        copied = at_targets(log_pointer, source_tokens_bs, targets_brt)
        return log_mixture(pick_logprobs(logits, targets_brt), copied, odds)

    def start_decoding(
        self,
        enc_bsd: Float[Array, "b s d"],
        enc_mask_bs: Bool[Array, "b s"],
        variants: int,
        length: int,
        source_tokens_bs: Int[Array, "b s"] | None = None,
    ) -> DecodingState:
        """State for ``step``: ``variants`` targets of at most ``length`` tokens per source.

        ``source_tokens_bs``: tokens that may be copied, for a pointer.
        """
        mask = mask_source(enc_mask_bs[:, None], 1)
        state = self.decoder.start(enc_bsd, mask, variants, length)
        if not self.config.pointer:
            return state
        assert source_tokens_bs is not None
        b, s = source_tokens_bs.shape
        return dataclasses.replace(
            state,
            source=self.decoder.pointer.source(enc_bsd, source_tokens_bs),
            pointer=PointerState(
                before_n=jnp.zeros((b * variants,), jnp.int32),
                logits_ns=jnp.zeros((b * variants, s), jnp.float32),
            ),
            source_mask_bs=enc_mask_bs,
        )

    def step(
        self, tokens_n: Int[Array, " n"], state: DecodingState
    ) -> tuple[Float[Array, "n v"], DecodingState]:
        """Feed one token per target, n = b * variants; float32 logits [n, v] of the next."""
        logits_n1v, state = self.steps(tokens_n[:, None], state)
        return logits_n1v[:, 0], state.keep(1)

    def steps(
        self, tokens_nw: Int[Array, "n w"], state: DecodingState
    ) -> tuple[Float[Array, "n w v"], DecodingState]:
        """Feed w tokens per target at once.

        Returns:
          float32 logits [n, w, v] of what follows each of them, and a state for
          `DecodingState.keep`, which says how many of the tokens count.
        """
        x = self._embed_targets(tokens_nw)
        x, state = self.decoder.steps(x, state)
        logits_nwv = self.logits(x)
        if state.source is None:
            return logits_nwv, state
        assert state.pointer is not None and state.source_mask_bs is not None
        log_pointer_nws, odds_nw, pointer = self.decoder.pointer.step(
            x, tokens_nw, state.pointer, state.source, state.source_mask_bs
        )
        b, s = state.source.tokens_bs.shape
        copied = over_vocabulary(
            log_pointer_nws.reshape(b, -1, s), state.source.tokens_bs, logits_nwv.shape[-1]
        ).reshape(logits_nwv.shape)  # variants and positions apart again
        mixed = log_mixture(jax.nn.log_softmax(logits_nwv), copied, odds_nw[..., None])
        return mixed, dataclasses.replace(state, pointer=pointer)

    def _point(
        self,
        states_brtd: jax.Array,
        enc_bsd: jax.Array,
        enc_mask_brs: jax.Array,
        decoder_input_brt: jax.Array,
        source_tokens_bs: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        source = self.decoder.pointer.source(enc_bsd, source_tokens_bs)
        return self.decoder.pointer(states_brtd, decoder_input_brt, source, enc_mask_brs)

    def _mixed(
        self,
        logits_brtv: jax.Array,
        states_brtd: jax.Array,
        enc_bsd: jax.Array,
        enc_mask_brs: jax.Array,
        decoder_input_brt: jax.Array,
        source_tokens_bs: jax.Array,
    ) -> jax.Array:
        """Log-probabilities of the mixture over the whole vocabulary, [b, r, t, v]."""
        log_pointer, odds = self._point(
            states_brtd, enc_bsd, enc_mask_brs, decoder_input_brt, source_tokens_bs
        )
        b, r, t, s = log_pointer.shape
        copied = over_vocabulary(
            log_pointer.reshape(b, r * t, s), source_tokens_bs, logits_brtv.shape[-1]
        ).reshape(logits_brtv.shape)  # variants and positions apart again
        return log_mixture(jax.nn.log_softmax(logits_brtv), copied, odds[..., None])


def copyable(tokens: Int[Array, "*rows l"], config: ReaderConfig) -> Int[Array, "*rows l"]:
    """The tokens [..., l] of reader inputs that may be copied, 0 elsewhere.

    With a pointer these are the passage's tokens. Without a pointer all tokens are returned.
    """
    if not config.pointer:
        return tokens
    flat = tokens.reshape(-1, tokens.shape[-1])
    text = blocks_of(flat, config.start_id).text
    return jnp.where(text, flat, PAD_ID).reshape(tokens.shape)


def pick_logprobs(
    logits: Float[Array, "*rows v"], targets: Int[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """log_softmax(logits) at the targets, [..., v] and [...] -> [...]."""
    # Compared, not indexed: this stays sharded over the vocabulary and has no scatter as gradient.
    ids = jnp.arange(logits.shape[-1], dtype=targets.dtype).reshape(*(1,) * targets.ndim, -1)
    hit = targets[..., None] == ids
    picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    return picked - jax.nn.logsumexp(logits, axis=-1)
