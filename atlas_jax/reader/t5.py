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
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from atlas_jax.core.layers import REMAT_POLICIES, Dense, Embed, RMSNorm, matmul
from atlas_jax.core.partitioning import constrain
from atlas_jax.core.types import PAD_ID, Array, Params
from atlas_jax.reader.attention import Attention, KeyValue, RelativePositionBias, mask_bias
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.pair_encoder import PairEncoder, blocks_of
from atlas_jax.reader.pointer import (
    Pointed,
    Pointer,
    PointerState,
    at_targets,
    log_mixture,
    over_vocabulary,
)

_ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu, "linear": lambda x: x}  # nn.gelu is the tanh form


class SourceMask(NamedTuple):
    """Which source positions a decoder position may read.

    Attributes:
      bias_n1qs: float32, added to the cross-attention logits; q is r * t or 1.
      visible_nq1: False where nothing is visible; cross-attention then gives zeros.
    """

    bias_n1qs: Float[Array, "n 1 q s"]
    visible_nq1: Bool[Array, "n q 1"]


@flax.struct.dataclass
class DecodingState:
    """What cached decoding carries from step to step.

    Attributes:
      index: int32 scalar, position that the next token takes.
      self_caches: keys and values of the targets so far, each [b * r, h, t, c]; one pair per
        layer, or one pair with a leading axis ``layers`` when layers are scanned.
      source_caches: keys and values of the source, [b, h, s, c], in the same structure.
      source_mask: visible source positions.
      position_bias_1htt: self-attention bias of all positions.
      source: the tokens that may be copied; None without a pointer.
      pointer: the pointer's last position; None without a pointer.
      source_mask_bs: bool, visible source positions.
    """

    index: Array
    self_caches: Any
    source_caches: Any
    source_mask: SourceMask
    position_bias_1htt: Array
    source: Pointed | None = None
    pointer: PointerState | None = None
    source_mask_bs: Array | None = None


def _dropout(config: ReaderConfig) -> nn.Dropout:
    # One mask for all positions of a sequence, as in T5X.
    return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))


def _norm(config: ReaderConfig) -> RMSNorm:
    return RMSNorm(dtype=config.compute_dtype)


class Mlp(nn.Module):
    """Feed-forward block: ``wi`` (relu) or ``wi_0``, ``wi_1`` (gated), then ``wo``."""

    config: ReaderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n l d"], deterministic: bool) -> Float[Array, "n l d"]:
        """[n, l, d] -> [n, l, d]."""
        cfg = self.config
        hidden: Any = 1.0
        for i, activation in enumerate(cfg.mlp_activations):
            name = "wi" if len(cfg.mlp_activations) == 1 else f"wi_{i}"
            wi = Dense(cfg.mlp_dim, ("embed", "mlp"), dtype=cfg.compute_dtype, name=name)
            hidden = hidden * _ACTIVATIONS[activation](wi(x))
        hidden = _dropout(cfg)(hidden, deterministic=deterministic)
        hidden = constrain(hidden, "batch", "length", "mlp")
        return Dense(cfg.emb_dim, ("mlp", "embed"), dtype=cfg.compute_dtype, name="wo")(hidden)


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each after a norm and with a residual connection."""

    config: ReaderConfig

    def setup(self) -> None:
        """Create the sub-layers."""
        self.pre_attention_layer_norm = _norm(self.config)
        self.attention = Attention(self.config)
        self.pre_mlp_layer_norm = _norm(self.config)
        self.mlp = Mlp(self.config)
        self.dropout = _dropout(self.config)

    def __call__(
        self,
        x_nld: Float[Array, "n l d"],
        biases: tuple[Float[Array, "#n #h #l l"], ...],
        deterministic: bool,
    ) -> tuple[Float[Array, "n l d"], None]:
        """[n, l, d] -> [n, l, d]; a scan needs an output for each layer, which is None."""
        x = constrain(x_nld, "batch", "length", "embed")
        y = self.pre_attention_layer_norm(x)
        y, _ = self.attention(y, self.attention.keys_values(y), biases, deterministic)
        x = x + self.dropout(y, deterministic=deterministic)
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return x + self.dropout(y, deterministic=deterministic), None


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and MLP, each after a norm and with a residual connection."""

    config: ReaderConfig

    def setup(self) -> None:
        """Create the sub-layers."""
        self.pre_self_attention_layer_norm = _norm(self.config)
        self.self_attention = Attention(self.config)
        self.pre_cross_attention_layer_norm = _norm(self.config)
        self.encoder_decoder_attention = Attention(self.config)
        self.pre_mlp_layer_norm = _norm(self.config)
        self.mlp = Mlp(self.config)
        self.dropout = _dropout(self.config)

    def __call__(
        self,
        x_ntd: Float[Array, "n t d"],
        enc_bsd: Float[Array, "b s d"],
        biases: tuple[Float[Array, "#n #h #t t"], ...],
        source_mask: SourceMask,
        weight_bt: Shaped[Array, "b t"] | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "n t d"], Float[Array, "b s"] | None]:
        """Decode whole targets; n = b * r.

        Returns:
          [n, t, d], and with ``weight_bt`` the attention mass of the source positions, [b, s].
        """
        x = constrain(x_ntd, "batch", "length", "embed")
        y = self.pre_self_attention_layer_norm(x)
        y, _ = self.self_attention(y, self.self_attention.keys_values(y), biases, deterministic)
        x = x + self.dropout(y, deterministic=deterministic)
        source = self.encoder_decoder_attention.keys_values(enc_bsd)
        x, probs = self._read_source(x, source, source_mask, deterministic)
        mass = None if weight_bt is None else _attention_mass(probs, source.value, weight_bt)
        return self._feed_forward(x, deterministic), mass

    def source_cache(self, _: None, enc_bsd: Float[Array, "b s d"]) -> tuple[None, KeyValue]:
        """Keys and values of the source for ``step``."""
        return None, self.encoder_decoder_attention.keys_values(enc_bsd)

    def step(
        self,
        x_n1d: Float[Array, "n 1 d"],
        cache: KeyValue,
        source: KeyValue,
        biases: tuple[Float[Array, "#n #h 1 _"], ...],
        source_mask: SourceMask,
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "n 1 d"], KeyValue]:
        """Decode one position, which enters the cache at ``index``."""
        y = self.pre_self_attention_layer_norm(x_n1d)
        now = self.self_attention.keys_values(y)
        cache = KeyValue(
            *(
                jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=2)
                for old, new in zip(cache, now, strict=True)
            )
        )
        y, _ = self.self_attention(y, cache, biases, True)
        x, _ = self._read_source(x_n1d + y, source, source_mask, True)
        return self._feed_forward(x, True), cache

    def _read_source(
        self, x_ntd: jax.Array, source: KeyValue, mask: SourceMask, deterministic: bool
    ) -> tuple[jax.Array, jax.Array]:
        n, t, d = x_ntd.shape
        y = self.pre_cross_attention_layer_norm(x_ntd)
        b = source.key.shape[0]
        y = y.reshape(b, n // b * t, d)  # variants of one source side by side
        y, probs = self.encoder_decoder_attention(y, source, (mask.bias_n1qs,), deterministic)
        y = jnp.where(mask.visible_nq1, y, 0).reshape(n, t, d)
        return x_ntd + self.dropout(y, deterministic=deterministic), probs

    def _feed_forward(self, x: jax.Array, deterministic: bool) -> jax.Array:
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return x + self.dropout(y, deterministic=deterministic)


def _attention_mass(probs_bhts: Any, value_bhsc: Any, weight_bt: jax.Array) -> jax.Array:
    """Mean over heads of attention x ||value||, summed over weighted targets, [b, s] float32."""
    norm_bhs = jnp.linalg.norm(value_bhsc.astype(jnp.float32), axis=-1)
    total_bhs = jnp.einsum("bhts,bt->bhs", probs_bhts, weight_bt.astype(jnp.float32))
    return jnp.mean(total_bhs * norm_bhs, axis=1)


def _make_layers(layer_class: Any, config: ReaderConfig, count: int, methods: Any) -> Any:
    """Make a list of ``count`` layers, or with ``config.scan_layers`` one layer to be scanned.

    Args:
      layer_class: the module of one layer.
      config: sizes, and whether to scan and rematerialise.
      count: the number of layers.
      methods: the methods that a scan calls for each layer. Name -> two numbers that count their
        arguments after the first one, which is the scan's carry: first the arguments that have
        an entry for each layer, then those that are the same for all layers.
    """
    if config.remat_policy != "none":
        # Position of the last argument, `deterministic`, not counting self.
        deterministic = sum(methods["__call__"])
        layer_class = nn.remat(
            layer_class,
            policy=REMAT_POLICIES[config.remat_policy],
            prevent_cse=not config.scan_layers,
            static_argnums=(deterministic + 1,),
        )
    if not config.scan_layers:
        return [layer_class(config) for _ in range(count)]
    lifted = {
        name: {
            "variable_axes": {"params": 0},
            "split_rngs": {"params": True, "dropout": True},
            "in_axes": (0,) * per_layer + (nn.broadcast,) * shared,
            "length": count,
            "metadata_params": {nn.PARTITION_NAME: "layers"},
        }
        for name, (per_layer, shared) in methods.items()
    }
    return nn.scan(layer_class, methods=lifted)(config)


class Encoder(nn.Module):
    """The encoder stack."""

    config: ReaderConfig

    def setup(self) -> None:
        """Create layers, position table and final norm."""
        cfg = self.config
        self.relpos_bias = RelativePositionBias(cfg, bidirectional=True)
        self.layers = _make_layers(EncoderLayer, cfg, cfg.num_encoder_layers, {"__call__": (0, 2)})
        self.encoder_norm = _norm(cfg)
        self.dropout = _dropout(cfg)

    def __call__(
        self, x_nld: Float[Array, "n l d"], mask_nl: Bool[Array, "n l"], deterministic: bool
    ) -> Float[Array, "n l d"]:
        """Embedded tokens [n, l, d] -> normed states [n, l, d]."""
        length = x_nld.shape[1]
        biases = (self.relpos_bias(length, length), mask_bias(mask_nl)[:, None, None, :])
        x = self.dropout(x_nld, deterministic=deterministic)
        if self.config.scan_layers:
            x, _ = self.layers(x, biases, deterministic)
        else:
            for layer in self.layers:
                x, _ = layer(x, biases, deterministic)
        return self.dropout(self.encoder_norm(x), deterministic=deterministic)


class Decoder(nn.Module):
    """The decoder stack and its vocabulary head."""

    config: ReaderConfig

    def setup(self) -> None:
        """Create layers, position table, final norm and, unless tied, the head."""
        cfg = self.config
        self.relpos_bias = RelativePositionBias(cfg, bidirectional=False)
        methods = {"__call__": (0, 5), "source_cache": (0, 1), "step": (2, 3)}
        self.layers = _make_layers(DecoderLayer, cfg, cfg.num_decoder_layers, methods)
        self.decoder_norm = _norm(cfg)
        self.dropout = _dropout(cfg)
        if cfg.encoder == "pair":  # the token table is not trained: these layers adapt it
            self.token_dense = Dense(cfg.emb_dim, ("embed", "joined_kv"), dtype=cfg.compute_dtype)
            self.logits_dense = Dense(cfg.emb_dim, ("embed", "joined_kv"), use_bias=True)
        elif not cfg.logits_via_embedding:
            self.logits_dense = Dense(cfg.vocab_size, ("embed", "vocab"), dtype=jnp.float32)
        if cfg.pointer:
            self.pointer = Pointer(cfg)

    def __call__(
        self,
        x_ntd: Float[Array, "n t d"],
        enc_bsd: Float[Array, "b s d"],
        source_mask: SourceMask,
        weight_bt: Shaped[Array, "b t"] | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "n t d"], Float[Array, "b s"] | None]:
        """Embedded inputs -> normed states [n, t, d] and, with weights, the mass [b, s]."""
        t = x_ntd.shape[1]
        biases = (self.relpos_bias(t, t), mask_bias(jnp.tri(t, dtype=bool))[None, None])
        x = self.dropout(x_ntd, deterministic=deterministic)
        shared = (enc_bsd, biases, source_mask, weight_bt, deterministic)
        if self.config.scan_layers:
            x, masses = self.layers(x, *shared)
            mass = None if masses is None else jnp.sum(masses, axis=0)
        else:
            mass = None
            for layer in self.layers:
                x, more = layer(x, *shared)
                mass = more if mass is None else mass + more
        return self.dropout(self.decoder_norm(x), deterministic=deterministic), mass

    def start(
        self, enc_bsd: Float[Array, "b s d"], source_mask: SourceMask, variants: int, length: int
    ) -> DecodingState:
        """Empty caches for ``length`` positions of ``variants`` targets per source."""
        cfg = self.config
        if cfg.scan_layers:
            _, sources = self.layers.source_cache(None, enc_bsd)
        else:
            sources = [layer.source_cache(None, enc_bsd)[1] for layer in self.layers]

        def empty(source: jax.Array) -> jax.Array:
            *layers, b, h, _, c = source.shape
            return jnp.zeros((*layers, b * variants, h, length, c), source.dtype)

        causal = mask_bias(jnp.tri(length, dtype=bool))[None, None]
        return DecodingState(
            index=jnp.zeros((), jnp.int32),
            self_caches=jax.tree.map(empty, sources),
            source_caches=sources,
            source_mask=source_mask,
            position_bias_1htt=self.relpos_bias(length, length) + causal,
        )

    def step(
        self, x_n1d: Float[Array, "n 1 d"], state: DecodingState
    ) -> tuple[Float[Array, "n 1 d"], DecodingState]:
        """Embedded tokens of one position -> normed states [n, 1, d] and the next state."""
        bias = jax.lax.dynamic_slice_in_dim(state.position_bias_1htt, state.index, 1, axis=2)
        shared = ((bias,), state.source_mask, state.index)
        x = x_n1d
        if self.config.scan_layers:
            x, caches = self.layers.step(x, state.self_caches, state.source_caches, *shared)
        else:
            caches = []
            for layer, cache, source in zip(
                self.layers, state.self_caches, state.source_caches, strict=True
            ):
                x, cache = layer.step(x, cache, source, *shared)
                caches.append(cache)
        state = dataclasses.replace(state, index=state.index + 1, self_caches=caches)
        return self.decoder_norm(x), state


class T5(nn.Module):
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
        self, tokens_nl: Int[Array, "n l"], deterministic: bool = True
    ) -> Float[Array, "n l d"]:
        """Tokens [n, l] (0 is padding) -> encoder states [n, l, d].

        A pair encoder needs two blocks, as `fid.join_inputs` makes them. States at padding are
        finite but have no meaning.
        """
        x = self._embed(tokens_nl)
        if self.config.encoder == "pair":
            return self.encoder(x, tokens_nl, deterministic)
        return self.encoder(x, tokens_nl > 0, deterministic)

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
        source_mask = _source_mask(enc_mask_brs, t)
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
        mask = _source_mask(enc_mask_bs[:, None], 1)
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
        x = self._embed_targets(tokens_n[:, None])
        x, state = self.decoder.step(x, state)
        logits_nv = self.logits(x[:, 0])
        if state.source is None:
            return logits_nv, state
        assert state.pointer is not None and state.source_mask_bs is not None
        log_pointer_ns, odds_n, pointer = self.decoder.pointer.step(
            x[:, 0], tokens_n, state.pointer, state.source, state.source_mask_bs
        )
        b, s = state.source.tokens_bs.shape
        copied = over_vocabulary(
            log_pointer_ns.reshape(b, -1, s), state.source.tokens_bs, logits_nv.shape[-1]
        ).reshape(logits_nv.shape)  # variants become rows again
        mixed = log_mixture(jax.nn.log_softmax(logits_nv), copied, odds_n[:, None])
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


def _source_mask(mask_brs: jax.Array, t: int) -> SourceMask:
    b, r, s = mask_brs.shape
    visible_br = jnp.any(mask_brs, axis=-1)
    if r > 1:  # positions of the variants lie side by side in cross-attention
        mask_brs = jnp.repeat(mask_brs, t, axis=1)
        visible_br = jnp.repeat(visible_br, t, axis=1)
    return SourceMask(mask_bias(mask_brs)[:, None], visible_br[..., None])


def stack_layers(params: Params) -> Params:
    """Parameters of an unrolled T5 -> those of the same model with ``scan_layers``.

    Arrays on the host are stacked there. Under an active mesh, ``jnp`` would put the whole result
    on every device.

    Args:
      params: unboxed dict with ``encoder/layers_0``, ``encoder/layers_1``...

    Returns:
      The same numbers with ``encoder/layers``, stacked on a leading axis in NumPy arrays.
    """
    stacked = dict(params)
    for stack in ("encoder", "decoder"):
        rest = dict(params[stack])
        names = sorted((k for k in rest if k.startswith("layers_")), key=lambda k: int(k[7:]))
        layers = [rest.pop(name) for name in names]
        stacked[stack] = {**rest, "layers": jax.tree.map(_stack, *layers)}
    return stacked


def _stack(*arrays: Any) -> Any:
    on_host = all(isinstance(array, np.ndarray) for array in arrays)
    return np.stack(arrays) if on_host else jnp.stack(arrays)


def unstack_layers(params: Params) -> Params:
    """The inverse of ``stack_layers``, of host arrays as well: views of the stacked ones."""
    unstacked = dict(params)
    for stack in ("encoder", "decoder"):
        rest = dict(params[stack])
        layers = rest.pop("layers")
        count = jax.tree.leaves(layers)[0].shape[0]
        for i in range(count):
            rest[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], layers)
        unstacked[stack] = rest
    return unstacked
