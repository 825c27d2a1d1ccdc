"""Shape and behaviour of the retriever, as one gin dataclass."""

import dataclasses

from atlas_jax.core.errors import UserError
from atlas_jax.encoders.registry import NamedEncoderConfig

POOLINGS = ("average", "sqrt", "cls")


@dataclasses.dataclass(frozen=True)
class RetrieverConfig(NamedEncoderConfig):
    """A dual encoder (arXiv 2112.09118); the defaults are Contriever's, BERT base.

    Sizes and other fields that all encoders share are those of `EncoderConfig`. Fields that only
    one kind of encoder has go into `encoder_options` of `NamedEncoderConfig`.

    Attributes:
        pooling: 'average' (mean of the real tokens), 'sqrt' (sum over the square root of
            their number) or 'cls' (the first token).
        normalize: Scale embeddings to length 1.
        tied: One tower for queries and passages; False gives two.
    """

    pooling: str = "average"
    normalize: bool = False
    tied: bool = True

    def __post_init__(self) -> None:
        """Raise `UserError`, naming the gin binding, when a field is out of range."""
        super().__post_init__()
        self._check_one_of("pooling", POOLINGS)
        if self.encoder_options.get("num_experts"):
            raise UserError(
                "RetrieverConfig.encoder_options: num_experts must be 0 in a retriever; the reader "
                "and what pretrain_encoder trains can have experts"
            )

    @property
    def embedding_dim(self) -> int:
        """Width of an embedding: the encoder's, as there is no projection."""
        return self.hidden_dim
