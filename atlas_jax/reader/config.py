"""Sizes and switches of the reader."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError
from atlas_jax.core.experts import ExpertFields
from atlas_jax.encoders.bert import BertConfig

RematPolicy = Literal["none", "minimal", "full"]
EncoderKind = Literal["t5", "pair"]
AttentionKind = Literal["xla", "fused"]

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_ACTIVATIONS = (("relu",), ("gelu", "linear"))


@dataclasses.dataclass(frozen=True)
class ReaderConfig(ExpertFields):
    """A T5 encoder-decoder, which may have Switch layers (`ExpertFields`).

    T5 1.0 is ``mlp_activations=('relu',), logits_via_embedding=True``; T5 1.1 and its
    LM-adapted form are ``('gelu', 'linear')`` and ``False`` (the defaults).

    Attributes:
      vocab_size: rows of the token embedding.
      emb_dim: width of the residual stream, d.
      num_heads: heads of every attention.
      num_encoder_layers, num_decoder_layers: depth of the two stacks.
      head_dim: channels of one head; ``num_heads * head_dim`` need not equal ``emb_dim``.
      mlp_dim: width of the hidden layer of an MLP.
      mlp_activations: ``('relu',)``, or ``('gelu', 'linear')`` for the gated form, whose
        gelu is the tanh approximation.
      dropout_rate: of embeddings, attention, MLP and residuals, with one mask for all positions
        of a sequence (as in T5X). No dropout if a method is called with
        ``deterministic=True``.
      logits_via_embedding: whether the output matrix is the embedding, scaled by
        ``emb_dim ** -0.5``, or a matrix of its own.
      dtype: ``'float32'`` or ``'bfloat16'``, of the activations; parameters, softmax and
        logits are float32 in both.
      relpos_buckets: rows of the relative-position table of each stack.
      relpos_max_distance: from this distance on, all positions share the last bucket.
      scan_layers: compile one layer and scan it, with parameters stacked on a leading axis
        ``layers``. Compiles faster, runs slower on CPU.
      remat_policy: ``'none'`` stores every activation for the backward pass, ``'minimal'``
        only the products with parameters, ``'full'`` only the inputs of each layer.
      float32_attention_logits: compute query-key products to float32 even when ``dtype``
        is narrower.
      attention: ``'xla'``, or ``'fused'``: kernels for TPU that keep the logits of the encoder's
        and of the cross-attention on the chip (`fused`). The results are the same.
      encoder: ``'t5'``, or ``'pair'``: a BERT tower that reads question and passage first
        apart and then together (`pair_encoder`).
      apart_layers: layers of a pair encoder that see question and passage apart. They and the
        token embedding are not trained, so that their states of a passage can be kept.
      encoder_mlp_dim: width inside the feed-forward block of a pair encoder.
      max_positions: longest question or passage of a pair encoder, in tokens.
      start_id: token in front of question and passage, for a pair encoder ([CLS]).
      matches: whether a pair encoder is told which tokens occur in both question and passage.
      pointer: mix the vocabulary with copying from the passages (`pointer`).
      pointer_ends: what stands after a copied token helps to decide whether the answer ends there.
    """

    vocab_size: bounds.Vocabulary
    emb_dim: bounds.Width
    num_heads: bounds.Width
    num_encoder_layers: bounds.Layers
    num_decoder_layers: bounds.Layers
    head_dim: bounds.Width
    mlp_dim: bounds.Width
    mlp_activations: Sequence[str] = ("gelu", "linear")
    dropout_rate: bounds.BelowOne = 0.1
    logits_via_embedding: bool = False
    dtype: str = "float32"
    relpos_buckets: bounds.Width = 32
    relpos_max_distance: bounds.Width = 128
    scan_layers: bool = False
    remat_policy: RematPolicy = "none"
    float32_attention_logits: bool = True
    attention: AttentionKind = "xla"
    encoder: EncoderKind = "t5"
    apart_layers: bounds.AtLeast0 = 0
    encoder_mlp_dim: bounds.AtLeast0 = 0
    max_positions: bounds.Length = 512
    start_id: bounds.AtLeast1 = 101
    matches: bool = True
    pointer: bool = False
    pointer_ends: bool = False

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
          UserError: names the field, its value and what would be right.
        """
        bounds.check(self)
        # Gin gives lists, but the config of a flax module must be hashable.
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for name, allowed in (
            ("mlp_activations", _ACTIVATIONS),
            ("dtype", tuple(_DTYPES)),
        ):
            if getattr(self, name) not in allowed:
                choices = " or ".join(repr(a) for a in allowed)
                raise UserError(f"ReaderConfig.{name} = {getattr(self, name)!r}: must be {choices}")
        if self.num_heads * self.head_dim > bounds.WIDEST:
            raise UserError(
                f"ReaderConfig.num_heads = {self.num_heads}: expected num_heads * head_dim of at "
                f"most {bounds.WIDEST:,}; head_dim is {self.head_dim}"
            )
        exact = self.relpos_buckets // 4  # a direction's half of the encoder's buckets
        if self.relpos_buckets % 4 or self.relpos_max_distance <= 2 * exact:
            raise UserError(
                f"ReaderConfig.relpos_buckets = {self.relpos_buckets}: must be a multiple of 4, "
                f"less than twice relpos_max_distance = {self.relpos_max_distance}"
            )

        if self.pointer_ends and not self.pointer:
            raise UserError("ReaderConfig.pointer_ends = True needs ReaderConfig.pointer = True")
        self._check_pair()
        refused = "with scan_layers = True all layers have to be alike" if self.scan_layers else ""
        if self.encoder == "pair":
            refused = "a pair encoder's layers are a BERT's, without experts"
        self.check_experts(min(self.num_encoder_layers, self.num_decoder_layers), refused)

    def _check_pair(self) -> None:
        if self.encoder == "t5":
            if self.pointer:
                raise UserError(
                    "ReaderConfig.pointer = True needs ReaderConfig.encoder = 'pair', which knows "
                    "where the passage begins"
                )
            return
        rules = {
            "apart_layers": (
                self.apart_layers <= self.num_encoder_layers,
                f"at most num_encoder_layers = {self.num_encoder_layers}",
            ),
            "encoder_mlp_dim": (self.encoder_mlp_dim >= 1, "at least 1"),
            "attention": (self.attention == "xla", "'xla' for a pair encoder"),
            "start_id": (self.start_id < self.vocab_size, "a token of the vocabulary"),
            "scan_layers": (not self.scan_layers, "False for a pair encoder"),
            "emb_dim": (
                self.emb_dim == self.num_heads * self.head_dim,
                "num_heads * head_dim for a pair encoder",
            ),
        }
        for name, (right, wanted) in rules.items():
            if not right:
                raise UserError(f"ReaderConfig.{name} = {getattr(self, name)!r}: must be {wanted}")

    @property
    def block_start(self) -> int:
        """The token in front of question and passage; 0 for a reader without blocks."""
        return self.start_id if self.encoder == "pair" else 0

    @property
    def untrained(self) -> tuple[str, ...]:
        """Patterns of the parameters that never train: a pair encoder's lower layers and tables."""
        if self.encoder != "pair":
            return ()
        lower = (f"encoder/layers_{i}/*" for i in range(self.apart_layers))
        return ("token_embedder/*", "encoder/embeddings/*", *lower)

    @property
    def tower(self) -> BertConfig:
        """The pair encoder as a tower of its own."""
        return BertConfig(
            vocab_size=self.vocab_size,
            hidden_dim=self.emb_dim,
            num_layers=self.num_encoder_layers,
            num_heads=self.num_heads,
            mlp_dim=self.encoder_mlp_dim,
            max_positions=self.max_positions,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            remat_policy=self.remat_policy,
        )

    @property
    def varies(self) -> bool:
        """Whether the reader computes something else while it trains: dropout, other capacities."""
        return self.dropout_rate > 0 or self.num_experts > 0

    @property
    def compute_dtype(self) -> Any:
        """The jax type of ``dtype``."""
        return _DTYPES[self.dtype]
