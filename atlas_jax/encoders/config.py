"""The fields that every encoder's config has, and which of them decide the encoder's output."""

import dataclasses
from typing import Any, ClassVar

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError

DTYPES = ("float32", "bfloat16")
REMAT = ("none", "minimal", "full")
ATTENTION = ("xla", "fused")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The fields that all encoders share; the defaults are BERT base's.

    Attributes:
        vocab_size: Rows of the token embedding.
        hidden_dim: Width of the states.
        num_layers: Encoder layers.
        num_heads: Attention heads; has to divide hidden_dim.
        mlp_dim: Width inside the feed-forward block.
        max_positions: Rows of the learned position embedding; the longest text in tokens,
            see `max_length`.
        type_vocab_size: Rows of the token type embedding; without types, all tokens have type 0.
        layer_norm_eps: Added to the variance.
        dropout_rate: Of the hidden states and of the attention probabilities.
        dtype: Of the activations, 'float32' or 'bfloat16'; parameters are float32.
        scan_layers: Compile one layer and scan it: compiles faster, runs slower on CPU. Stored
            parameters are the same with and without it.
        remat_policy: 'none' stores every activation for the backward pass, 'minimal' only the
            products with parameters, 'full' only the inputs of each layer.
        attention: 'xla', or 'fused': kernels for TPU that keep the logits on the chip
            (`core.fused`), for a BERT and its relatives. The results are the same.
    """

    # These do not change what is computed at inference. `dtype` only rounds it, like the type of
    # an index: whoever runs the encoder chooses both.
    NEUTRAL: ClassVar[frozenset[str]] = frozenset(
        {"dropout_rate", "dtype", "scan_layers", "remat_policy", "attention"}
    )
    # These can be seen from the names and shapes of the parameters; a subclass lists them.
    TOLD_BY_PARAMETERS: ClassVar[frozenset[str]] = frozenset()

    vocab_size: bounds.Vocabulary = 30522
    hidden_dim: bounds.Width = 768
    num_layers: bounds.Layers = 12
    num_heads: bounds.Width = 12
    mlp_dim: bounds.Width = 3072
    max_positions: bounds.Length = 512
    type_vocab_size: bounds.Width = 2
    layer_norm_eps: bounds.BelowOne = 1e-12
    dropout_rate: bounds.BelowOne = 0.1
    dtype: str = "float32"
    scan_layers: bool = False
    remat_policy: str = "none"
    attention: str = "xla"

    def __post_init__(self) -> None:
        """Raise `UserError`, naming class and field, when a field is out of range."""
        name = type(self).__name__
        bounds.check(self)
        if self.hidden_dim % self.num_heads:
            raise UserError(
                f"{name}.num_heads = {self.num_heads}: must divide "
                f"{name}.hidden_dim = {self.hidden_dim}"
            )
        self._check_one_of("dtype", DTYPES)
        self._check_one_of("remat_policy", REMAT)
        self._check_one_of("attention", ATTENTION)

    @property
    def max_length(self) -> int:
        """Longest text in tokens."""
        return self.max_positions

    def uses(self, path: str) -> int:
        """How often one text goes through the parameter of this path: more than once if shared."""
        return 1

    def output_fields(self) -> dict[str, Any]:
        """The fields that, with the parameters, decide the output; a fingerprint covers them.

        All fields but two sets. Those in `NEUTRAL` change nothing. Those in `TOLD_BY_PARAMETERS`
        are already covered by the fingerprint of the parameters.
        """
        left_out = self.NEUTRAL | self.TOLD_BY_PARAMETERS
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in left_out
        }

    def _check_one_of(self, field: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, field) not in allowed:
            raise UserError(
                f"{type(self).__name__}.{field} = {getattr(self, field)!r}: must be one of "
                f"{', '.join(allowed)}"
            )
