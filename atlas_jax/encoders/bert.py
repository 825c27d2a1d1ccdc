"""The BERT encoder (arXiv 1810.04805): post-layer-norm, learned positions."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Integer

from atlas_jax.core import adapters, fused
from atlas_jax.core.errors import UserError
from atlas_jax.core.experts import EXPERT_FIELDS, ExpertFields, SwitchMlp
from atlas_jax.core.fused import Seen
from atlas_jax.core.layers import REMAT_POLICIES, Dense, Embed, LayerNorm, softmax
from atlas_jax.core.packing import places_in_segments
from atlas_jax.core.partitioning import constrain
from atlas_jax.core.types import PAD_ID, Array
from atlas_jax.encoders.config import EncoderConfig
from atlas_jax.encoders.visible import attention_of

Layer = Callable[[jax.Array, jax.Array, bool], jax.Array]


def gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """The exact gelu, x/2 (1 + erf(x / sqrt 2)); on CPU erf costs less than jax.nn's erfc."""
    return x * (0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5))))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
INITIALIZERS: dict[str, Callable[..., Any]] = {
    "normal": nn.initializers.normal(0.02),
    "truncated_normal": nn.initializers.truncated_normal(0.02),
}


@dataclasses.dataclass(frozen=True)
class BertConfig(ExpertFields, EncoderConfig):
    """A BERT; the defaults are those of BERT base as Hugging Face has it.

    It may have Switch layers, see `ExpertFields`.

    Attributes:
        activation: 'gelu' (exact, Hugging Face's BERT) or 'gelu_tanh' (its approximation by
            tanh, which the original BERT computes).
        released_layer_norm: (x - mean) / sqrt(mean(x^2) + eps), which the retrievers of
            the released Atlas checkpoints need; False is the standard layer norm.
        initializer: 'normal' or 'truncated_normal', both with standard deviation 0.02. The
            second is cut off at two standard deviations, as in the original BERT and ALBERT.
    """

    NEUTRAL: ClassVar[frozenset[str]] = EncoderConfig.NEUTRAL | {
        "initializer", "train_capacity_factor", "balance_weight",
    }  # fmt: skip
    TOLD_BY_PARAMETERS: ClassVar[frozenset[str]] = frozenset(
        {
            "vocab_size", "num_layers", "mlp_dim", "max_positions", "type_vocab_size",
            "num_experts", "expert_every",
        }
    )  # fmt: skip
    NO_EXPERTS: ClassVar[str] = ""  # why this kind of encoder has none

    activation: str = "gelu"
    released_layer_norm: bool = False
    initializer: str = "normal"

    def __post_init__(self) -> None:
        """Raise `UserError`, naming class and field, when a field is out of range."""
        super().__post_init__()
        self._check_one_of("activation", tuple(ACTIVATIONS))
        self._check_one_of("initializer", tuple(INITIALIZERS))
        scanned = "with scan_layers = True all layers have to be alike" if self.scan_layers else ""
        self.check_experts(self.num_layers, self.NO_EXPERTS or scanned)

    @property
    def table_dim(self) -> int:
        """Width of the embedding tables."""
        return self.hidden_dim

    @property
    def first_position(self) -> int:
        """Row of the position table for the first token of a text."""
        return self.max_positions - self.max_length

    @property
    def projects(self) -> bool:
        """Whether embeddings have another width than the states, and so need a projection."""
        return self.table_dim != self.hidden_dim

    def output_fields(self) -> dict[str, Any]:
        """As `EncoderConfig.output_fields`."""
        fields = super().output_fields()
        if self.activation == "gelu":  # older fingerprints do not have this field
            del fields["activation"]
        if not self.num_experts:
            fields = {name: x for name, x in fields.items() if name not in EXPERT_FIELDS}
        return fields


def dense(
    config: BertConfig, features: int, axes: tuple[str, str], name: str | None = None
) -> Dense:
    """A product with bias in the config's dtype, initialised as the config says."""
    return Dense(
        features=features,
        kernel_axes=axes,
        use_bias=True,
        dtype=jnp.dtype(config.dtype),
        kernel_init=INITIALIZERS[config.initializer],
        name=name,
    )


def layer_norm(config: BertConfig, name: str | None = None) -> LayerNorm:
    """The config's layer norm."""
    return LayerNorm(
        epsilon=config.layer_norm_eps,
        released=config.released_layer_norm,
        dtype=jnp.dtype(config.dtype),
        name=name,
    )


class BertEmbeddings(nn.Module):
    """Token + position + type embedding, normalised."""

    config: BertConfig

    def setup(self) -> None:
        """Make the three tables and the norm."""
        cfg = self.config

        def table(rows: int, axis: str) -> Embed:
            return Embed(
                num_embeddings=rows,
                features=cfg.table_dim,
                axes=(axis, "embed"),
                dtype=jnp.dtype(cfg.dtype),
                embedding_init=INITIALIZERS[cfg.initializer],
            )

        # BERT's 30,522 rows would not divide over most meshes, so their axis is not split.
        self.word_embeddings = table(cfg.vocab_size, "unsharded")
        self.position_embeddings = table(cfg.max_positions, "length")
        self.token_type_embeddings = table(cfg.type_vocab_size, "unsharded")
        self.layer_norm = layer_norm(cfg)
        self.dropout = nn.Dropout(cfg.dropout_rate)

    def __call__(
        self,
        tokens_bl: Integer[Array, "b l"],
        deterministic: bool,
        types_bl: Integer[Array, "b l"] | None = None,
        embedded_ble: Float[Array, "b l e"] | None = None,
        positions_bl: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l e"]:
        """Int tokens [b, l], or their rows of the token table, -> [b, l, e], e of the tables.

        Positions count from 0; without `positions_bl` they are 0, 1, 2...
        """
        x_ble = self.word_embeddings(tokens_bl) if embedded_ble is None else embedded_ble
        counted = jnp.arange(tokens_bl.shape[1])[None] if positions_bl is None else positions_bl
        x_ble = x_ble + self.position_embeddings(self.config.first_position + counted)
        types = jnp.zeros((1, 1), jnp.int32) if types_bl is None else types_bl
        x_ble = x_ble + self.token_type_embeddings(types)
        return self.dropout(self.layer_norm(x_ble), deterministic=deterministic)


class BertAttention(nn.Module):
    """Self-attention, logits and softmax in float32."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        x_bld: Float[Array, "b l d"],
        bias_b1ml: Float[Array, "b 1 #l l"] | Seen,
        deterministic: bool,
    ) -> Float[Array, "b l d"]:
        """States [b, l, d] and a float32 bias [b, 1, 1 or l, l] over keys -> [b, l, d].

        For fused attention, who reads what comes in place of the bias.
        """
        cfg = self.config
        b, length, width = x_bld.shape
        head_dim = width // cfg.num_heads
        # one mask for all query positions, as in T5X: full-size masks are expensive
        dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
        if isinstance(bias_b1ml, Seen):
            return self._fused(x_bld, bias_b1ml, None if deterministic else dropout)

        def heads(name: str) -> jax.Array:
            y_bld = dense(cfg, width, ("embed", "joined_kv"), name)(x_bld)
            # heads before length: a plain batched product, several times faster on CPU
            y_bhlk = y_bld.reshape(b, length, cfg.num_heads, head_dim).transpose(0, 2, 1, 3)
            return constrain(y_bhlk, "batch", "heads", "length", "kv")

        query_bhlk = heads("query") * (1.0 / math.sqrt(head_dim))
        key_bhmk = adapters.behind_prefix(self, "key", heads("key"))
        bias_b1ml = adapters.beside_prefix(self, bias_b1ml)
        logits_bhlm = jnp.einsum(
            "bhlk,bhmk->bhlm", query_bhlk, key_bhmk, preferred_element_type=jnp.float32
        )
        weights_bhlm = softmax(logits_bhlm + bias_b1ml).astype(x_bld.dtype)
        weights_bhlm = dropout(weights_bhlm, deterministic=deterministic)
        value_bhmk = adapters.behind_prefix(self, "value", heads("value"))
        mixed_bhlk = jnp.einsum("bhlm,bhmk->bhlk", weights_bhlm, value_bhmk)
        mixed_bld = mixed_bhlk.transpose(0, 2, 1, 3).reshape(b, length, width)
        return dense(cfg, width, ("joined_kv", "embed"), "output")(mixed_bld)

    def _fused(self, x_bld: jax.Array, seen: Seen, dropout: nn.Dropout | None) -> jax.Array:
        """The same by the kernels of `core.fused`."""
        cfg = self.config
        if adapters.prefix_length(self):
            raise UserError(
                f"{type(cfg).__name__}.attention = 'fused' cannot read the prefix of an attention "
                "(DeltaConfig.kind = 'prefix'): bind 'xla'"
            )
        b, length, width = x_bld.shape
        query_ble, key_ble, value_ble = (
            dense(cfg, width, ("embed", "joined_kv"), name)(x_bld)
            for name in ("query", "key", "value")
        )
        factor_bhl = None
        if dropout is not None:
            ones = jnp.ones((b, cfg.num_heads, 1, length), jnp.float32)
            factor_bhl = dropout(ones, deterministic=False)[:, :, 0]
        query_ble = query_ble * (1.0 / math.sqrt(width // cfg.num_heads))
        mixed_ble, _ = fused.attend(
            query_ble, key_ble, value_ble, seen, None, cfg.num_heads, factor_bhl
        )
        mixed_ble = constrain(mixed_ble, "batch", "length", "joined_kv")
        return dense(cfg, width, ("joined_kv", "embed"), "output")(mixed_ble)


class BertLayer(nn.Module):
    """Attention and feed-forward, each followed by residual and layer norm.

    Attributes:
        parts: which of the two blocks it has, in the order in which they run.
        switch: whether the feed-forward block has experts.
    """

    config: BertConfig
    parts: tuple[str, ...] = ("attention", "feed_forward")
    switch: bool = False

    @nn.compact
    def __call__(
        self,
        x_bld: Float[Array, "b l d"],
        bias_b1ml: Float[Array, "b 1 #l l"] | Seen,
        deterministic: bool,
    ) -> Float[Array, "b l d"]:
        """States [b, l, d] -> [b, l, d]."""
        if "attention" in self.parts:
            x_bld = self._attend(x_bld, bias_b1ml, deterministic)
        if "feed_forward" in self.parts:
            x_bld = self._feed_forward(x_bld, deterministic)
        return x_bld

    def _attend(self, x_bld: jax.Array, bias_b1ml: Any, deterministic: bool) -> jax.Array:
        cfg = self.config
        y_bld = BertAttention(cfg, name="attention")(x_bld, bias_b1ml, deterministic)
        y_bld = nn.Dropout(cfg.dropout_rate)(y_bld, deterministic=deterministic)
        x_bld = layer_norm(cfg, "attention_layer_norm")(x_bld + y_bld)
        return constrain(x_bld, "batch", "length", "embed")

    def _feed_forward(self, x_bld: jax.Array, deterministic: bool) -> jax.Array:
        cfg = self.config
        if self.switch:
            y_bld = switch_mlp(cfg)(x_bld, deterministic)
        else:
            y_blf = dense(cfg, cfg.mlp_dim, ("embed", "mlp"), "intermediate")(x_bld)
            y_blf = constrain(ACTIVATIONS[cfg.activation](y_blf), "batch", "length", "mlp")
            y_bld = dense(cfg, cfg.hidden_dim, ("mlp", "embed"), "output")(y_blf)
        y_bld = nn.Dropout(cfg.dropout_rate)(y_bld, deterministic=deterministic)
        x_bld = layer_norm(cfg, "output_layer_norm")(x_bld + y_bld)
        return constrain(x_bld, "batch", "length", "embed")


def switch_mlp(config: BertConfig) -> SwitchMlp:
    """The experts in place of a layer's feed-forward block, with its activation and biases."""
    return SwitchMlp(
        config,
        config.mlp_dim,
        (ACTIVATIONS[config.activation],),
        jnp.dtype(config.dtype),
        INITIALIZERS[config.initializer],
        use_bias=True,
        name="mlp",
    )


class BertEncoder(nn.Module):
    """Tokens to states; the interface that every encoder of the registry has."""

    config: BertConfig

    def setup(self) -> None:
        """Make the embeddings and the layers."""
        cfg = self.config
        self.embeddings = BertEmbeddings(cfg)
        if cfg.projects:
            self.embedding_projection = dense(cfg, cfg.hidden_dim, ("unsharded", "embed"))
        self.make_layers()

    def make_layers(self) -> None:
        """Make the layers, as attributes of this module."""
        cfg, layer = self.config, rematerialised(BertLayer, self.config)
        self.layers = [layer(cfg, switch=cfg.is_switch(i)) for i in range(cfg.num_layers)]

    def steps(self) -> list[Layer]:
        """One function per layer, from its input states to its output states."""
        return list(self.layers)

    def scanned(self) -> tuple[Any, Callable[..., jax.Array]]:
        """`steps` in the form of a scan: one input per layer, and the function that takes it."""
        layers = [self.layer_params(f"layers_{i}") for i in range(self.config.num_layers)]
        layer = rematerialised(BertLayer, self.config)(self.config, parent=None)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)  # stored unstacked
        return stacked, functools.partial(apply_layer, layer)

    def layer_params(self, name: str) -> Any:
        """The parameters of a submodule that is already initialised."""
        return self.variables["params"][name]

    def __call__(
        self,
        tokens_bl: Integer[Array, "b l"],
        deterministic: bool = True,
        *,
        mask: Bool[Array, "b l"] | Bool[Array, "b l l"] | None = None,
        types_bl: Integer[Array, "b l"] | None = None,
        embedded_ble: Float[Array, "b l e"] | None = None,
        segments_bl: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Encode texts. Without a mask, id 0 is padding on the right and is never attended to.

        Args:
            tokens_bl: int tokens with their special tokens.
            deterministic: False applies dropout (needs the rng 'dropout').
            mask: True where a key may be read, [b, l] for all positions of a row alike or
                [b, l, l] as [row, reader, key].
            types_bl: int token types; None is type 0 everywhere.
            embedded_ble: used in place of the token table's rows for `tokens_bl`, before
                positions and types are added. As wide as the table, see `embed_tokens`.
            segments_bl: numbers of the texts that share a row, see `core.packing`. A token reads
                its own text alone, whose positions count from 0. Not with a mask; None = each row
                is one text.

        Returns:
            States [b, l, d] of the last layer, in the config's dtype. Ignore those at padding.

        Raises:
            UserError: The texts are longer than `max_positions`.
        """
        assert mask is None or segments_bl is None
        given = (mask, types_bl, embedded_ble, segments_bl)
        return self._encode(tokens_bl, deterministic, *given)[-1]

    def all_states(
        self,
        tokens_bl: Integer[Array, "b l"],
        deterministic: bool = True,
        *,
        mask: Bool[Array, "b l"] | Bool[Array, "b l l"] | None = None,
        types_bl: Integer[Array, "b l"] | None = None,
        embedded_ble: Float[Array, "b l e"] | None = None,
    ) -> list[Float[Array, "b l d"]]:
        """As `__call__`, but a list: the states before the first layer, then after each layer."""
        given = (mask, types_bl, embedded_ble, None)
        return self._encode(tokens_bl, deterministic, *given, every=True)

    def embed_tokens(self, tokens: Integer[Array, "*rows"]) -> Float[Array, "*rows e"]:
        """Rows of the token table, int [...] -> [..., e]; in a BERT, e is the width d."""
        return self.embeddings.word_embeddings(tokens.astype(jnp.int32))

    def token_table(self) -> Float[Array, "v e"]:
        """The token table itself, [v, e]."""
        return self.embeddings.word_embeddings.embedding

    def _encode(
        self,
        tokens_bl: jax.Array,
        deterministic: bool,
        mask: jax.Array | None,
        types_bl: jax.Array | None,
        embedded_ble: jax.Array | None,
        segments_bl: jax.Array | None,
        every: bool = False,
    ) -> list[jax.Array]:
        """The states of the last layer, or with `every` those of all layers."""
        cfg = self.config
        check_length(cfg, tokens_bl.shape[1], "the encoder")
        tokens_bl = tokens_bl.astype(jnp.int32)
        mask = tokens_bl != PAD_ID if mask is None else mask
        bias_b1ml: Any = attention_of(cfg, mask, segments_bl)
        positions_bl = None if segments_bl is None else places_in_segments(segments_bl)
        x_bld = self.embeddings(tokens_bl, deterministic, types_bl, embedded_ble, positions_bl)
        if cfg.projects:
            x_bld = self.embedding_projection(x_bld)
        states = [constrain(x_bld, "batch", "length", "embed")]
        if cfg.scan_layers and not self.is_initializing():
            return self._scan(states[0], bias_b1ml, deterministic, every)
        for step in self.steps():
            states.append(step(states[-1], bias_b1ml, deterministic))
        return states if every else states[-1:]

    def _scan(
        self, x_bld: jax.Array, bias_b1ml: Any, deterministic: bool, every: bool
    ) -> list[jax.Array]:
        """The layers as one compiled body."""
        inputs, step = self.scanned()
        keys = (
            None
            if deterministic
            else jax.random.split(self.make_rng("dropout"), self.config.num_layers)
        )

        def body(x_bld: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
            x_bld = step(*xs, x_bld, bias_b1ml, deterministic)
            return x_bld, x_bld if every else None

        last_bld, every_nbld = jax.lax.scan(body, x_bld, (inputs, keys))
        return [x_bld, *every_nbld] if every else [last_bld]


def apply_layer(
    layer: Any,
    params: Any,
    key: jax.Array | None,
    x_bld: Float[Array, "b l d"],
    bias_b1ml: Float[Array, "b 1 #l l"] | Seen,
    deterministic: bool,
) -> Float[Array, "b l d"]:
    """Apply a layer with these parameters; `key` is for dropout, None for no dropout."""
    rngs = None if key is None else {"dropout": key}
    return layer.apply({"params": params}, x_bld, bias_b1ml, deterministic, rngs=rngs)


def check_length(config: EncoderConfig, length: int, who: str) -> None:
    """Refuse texts longer than the position table.

    Raises:
        UserError: names the field of the config.
    """
    if length > config.max_length:
        raise UserError(
            f"{who} got texts of {length} tokens, of at most {config.max_length}: shorten them or "
            f"raise {type(config).__name__}.max_positions = {config.max_positions}"
        )


def rematerialised(
    layer: Any, config: EncoderConfig, static_argnums: tuple[int, ...] = (3,)
) -> Any:
    """The layer class; its backward pass recomputes what the policy does not keep."""
    if config.remat_policy == "none":
        return layer
    return nn.remat(
        layer,
        policy=REMAT_POLICIES[config.remat_policy],
        prevent_cse=not config.scan_layers,
        static_argnums=static_argnums,
    )
