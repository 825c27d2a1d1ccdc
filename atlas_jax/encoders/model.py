"""An encoder with its heads: what pretraining gives, and what a prompt or a classifier needs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Integer

from atlas_jax.core import bounds
from atlas_jax.core.adapters import WithPrefixes
from atlas_jax.core.errors import UserError
from atlas_jax.core.types import Array
from atlas_jax.encoders.heads import (
    HEADS,
    BoundaryHead,
    DiscriminatorHead,
    MlmHead,
    PermutationHead,
    SentenceHead,
)
from atlas_jax.encoders.registry import NamedEncoderConfig, make_encoder


@dataclasses.dataclass(frozen=True)
class EncoderModelConfig(NamedEncoderConfig):
    """An encoder and the heads on it.

    Attributes:
        heads: names of `encoders.heads.HEADS`: 'mlm' predicts masked tokens, 'sentence' the
            order of two sentences or the class of a text, 'discriminator' replaced tokens,
            'boundary' the tokens of a masked span from the states beside it, 'plm' the targets of
            XLNet's permutations.
        num_classes: of the sentence head.
        head_dropout_rate: of the sentence head's pooled state, apart from the encoder's.
    """

    heads: Sequence[str] = ()
    num_classes: bounds.Width = 2
    head_dropout_rate: bounds.BelowOne = 0.1

    def __post_init__(self) -> None:
        """Raise `UserError`, naming the gin binding, when a field is out of range."""
        super().__post_init__()
        object.__setattr__(self, "heads", tuple(self.heads))  # JSON gives a list
        for head in self.heads:
            if head not in HEADS:
                raise UserError(
                    f"EncoderModelConfig.heads: {head!r} is none; use {', '.join(HEADS)}"
                )


class EncoderModel(WithPrefixes):
    """Parameters: {'encoder': ..., and each head under its name}."""

    config: EncoderModelConfig

    def setup(self) -> None:
        """Make the encoder and its heads."""
        cfg: Any = self.config.tower
        self.encoder = make_encoder(cfg)
        if "mlm" in self.config.heads:
            self.mlm = MlmHead(cfg)
        if "sentence" in self.config.heads:
            classes, rate = self.config.num_classes, self.config.head_dropout_rate
            self.sentence = SentenceHead(cfg, classes, rate)
        if "discriminator" in self.config.heads:
            self.discriminator = DiscriminatorHead(cfg)
        if "boundary" in self.config.heads:
            self.boundary = BoundaryHead(cfg)
        if "plm" in self.config.heads:
            self.plm = PermutationHead(cfg)

    def __call__(
        self, tokens_bl: Integer[Array, "b l"], deterministic: bool = True, **inputs: Any
    ) -> tuple[Float[Array, "b l d"], dict[str, jax.Array]]:
        """Tokens to states and to what each head makes of them.

        Args:
            tokens_bl: int tokens, pad 0.
            deterministic: False applies dropout.
            inputs: further arguments of `BertEncoder`: mask, types_bl, embedded_ble.

        Returns:
            States [b, l, d]; logits by head: 'mlm' [b, l, v], 'sentence' [b, classes],
            'discriminator' [b, l], 'plm' [b, l, v], all float32.
        """
        states_bld = self.states(tokens_bl, deterministic, **inputs)
        logits: dict[str, jax.Array] = {}
        if "mlm" in self.config.heads:
            logits["mlm"] = self.token_logits(states_bld)
        if "sentence" in self.config.heads:
            logits["sentence"] = self.sentence_logits(states_bld, deterministic)
        if "discriminator" in self.config.heads:
            logits["discriminator"] = self.replaced_logits(states_bld)
        if "plm" in self.config.heads:
            logits["plm"] = self.permuted_logits(states_bld)
        if "boundary" in self.config.heads and self.is_initializing():
            beside = states_bld[:, 0]  # it needs to know the spans, see `boundary_logits`
            self.boundary_logits(beside, beside, jnp.zeros(beside.shape[:-1], jnp.int32))
        return states_bld, logits

    def states(
        self, tokens_bl: Integer[Array, "b l"], deterministic: bool = True, **inputs: Any
    ) -> Float[Array, "b l d"]:
        """Tokens [b, l] to the encoder's states, without any head; `inputs` as above."""
        states_bld: jax.Array = self.encoder(tokens_bl, deterministic, **inputs)
        return states_bld

    def token_logits(self, states: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
        """States [..., d] at the places to predict -> logits [..., v] of the MLM head."""
        logits: jax.Array = self.mlm(states, self.encoder.token_table())
        return logits

    def predicted(
        self, tokens_bl: Integer[Array, "b l"], deterministic: bool = True, **inputs: Any
    ) -> Float[Array, "b p d"]:
        """An XLNet's states of targets; `inputs` as of `XlnetEncoder.predicted`."""
        states_bpd: jax.Array = self.encoder.predicted(
            tokens_bl, deterministic=deterministic, **inputs
        )
        return states_bpd

    def permuted_logits(self, states: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
        """States [..., d] of targets -> logits [..., v] of XLNet's head."""
        logits: jax.Array = self.plm(states, self.encoder.token_table())
        return logits

    def sentence_logits(
        self, states_bld: Float[Array, "b l d"], deterministic: bool = True
    ) -> Float[Array, "b c"]:
        """States [b, l, d] -> logits [b, classes] of the sentence head."""
        logits_bc: jax.Array = self.sentence(states_bld, deterministic)
        return logits_bc

    def replaced_logits(self, states_bld: Float[Array, "b l d"]) -> Float[Array, "b l"]:
        """States [b, l, d] -> for each token the logit that it was replaced."""
        logits_bl: jax.Array = self.discriminator(states_bld)
        return logits_bl

    def boundary_logits(
        self, left: Float[Array, "*rows d"], right: Float[Array, "*rows d"],
        places: Int[Array, "*rows"],
    ) -> Float[Array, "*rows v"]:  # fmt: skip
        """States beside a masked span, and a token's place in it -> logits [..., v]."""
        logits: jax.Array = self.boundary(left, right, places, self.encoder.token_table())
        return logits

    def embed_tokens(self, tokens: Integer[Array, "*rows"]) -> Float[Array, "*rows e"]:
        """Rows of the token table, int [...] -> [..., e]."""
        rows: jax.Array = self.encoder.embed_tokens(tokens)
        return rows
