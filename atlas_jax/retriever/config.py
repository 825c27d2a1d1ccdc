"""Shape and behaviour of the retriever, as one gin dataclass."""

import dataclasses

import gin

from atlas_jax.core.errors import UserError

POOLINGS = ("average", "sqrt", "cls")
DTYPES = ("float32", "bfloat16")
REMAT = ("none", "minimal", "full")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class RetrieverConfig:
    """A BERT dual encoder (arXiv 2112.09118); the defaults are Contriever's, BERT base.

    Attributes:
        vocab_size: Rows of the token embedding.
        hidden_dim: Width of the encoder and of the embedding it gives.
        num_layers: Encoder layers.
        num_heads: Attention heads; has to divide hidden_dim.
        mlp_dim: Width inside the feed-forward block.
        max_positions: Longest text in tokens, rows of the learned position embedding.
        type_vocab_size: Rows of the token type embedding; texts are all of type 0.
        pooling: 'average' (mean of the real tokens), 'sqrt' (sum over the square root of
            their number) or 'cls' (the first token).
        normalize: Scale embeddings to length 1.
        tied: One tower for queries and passages; False gives two.
        layer_norm_eps: Added to the variance.
        released_layer_norm: (x - mean) / sqrt(mean(x^2) + eps), which the retrievers of
            the released Atlas checkpoints need; False is the standard layer norm.
        dropout_rate: Of the hidden states and of the attention probabilities.
        dtype: Of the activations, 'float32' or 'bfloat16'; parameters are float32.
        scan_layers: Compile one layer and scan it: compiles faster, runs slower on CPU. The
            parameters are stored as without it.
        remat_policy: 'none' stores every activation for the backward pass, 'minimal' only the
            products with parameters, 'full' only the inputs of each layer.
    """

    vocab_size: int = 30522
    hidden_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    max_positions: int = 512
    type_vocab_size: int = 2
    pooling: str = "average"
    normalize: bool = False
    tied: bool = True
    layer_norm_eps: float = 1e-12
    released_layer_norm: bool = False
    dropout_rate: float = 0.1
    dtype: str = "float32"
    scan_layers: bool = False
    remat_policy: str = "none"

    def __post_init__(self) -> None:
        """Raise `UserError`, naming the gin binding, when a field is out of range."""
        for field in (
            "vocab_size",
            "hidden_dim",
            "num_layers",
            "num_heads",
            "mlp_dim",
            "max_positions",
            "type_vocab_size",
        ):
            if getattr(self, field) < 1:
                raise UserError(f"RetrieverConfig.{field} = {getattr(self, field)}: must be >= 1")
        if self.hidden_dim % self.num_heads:
            raise UserError(
                f"RetrieverConfig.num_heads = {self.num_heads}: must divide "
                f"RetrieverConfig.hidden_dim = {self.hidden_dim}"
            )
        for field, allowed in (("pooling", POOLINGS), ("dtype", DTYPES), ("remat_policy", REMAT)):
            if getattr(self, field) not in allowed:
                raise UserError(
                    f"RetrieverConfig.{field} = {getattr(self, field)!r}: must be one of "
                    f"{', '.join(allowed)}"
                )
        if not 0 <= self.dropout_rate < 1:
            raise UserError(
                f"RetrieverConfig.dropout_rate = {self.dropout_rate}: must be in [0, 1)"
            )

    @property
    def embedding_dim(self) -> int:
        """Width of an embedding: the encoder's, as there is no projection."""
        return self.hidden_dim
