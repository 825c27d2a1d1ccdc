"""Shape and behaviour of the retriever, as one gin dataclass."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from atlas_jax.encoders.config import EncoderConfig
from atlas_jax.encoders.registry import encoder_config

POOLINGS = ("average", "sqrt", "cls")


@dataclasses.dataclass(frozen=True)
class RetrieverConfig(EncoderConfig):
    """A dual encoder (arXiv 2112.09118); the defaults are Contriever's, BERT base.

    Sizes and other fields that all encoders share are those of `EncoderConfig`. Fields that only
    one kind of encoder has go into `encoder_options`. `tower` is the encoder's own config.

    Attributes:
        encoder: Kind of the encoder, a name of `encoders.registry.ENCODERS`.
        encoder_options: Further fields of that encoder's config, by name.
        pooling: 'average' (mean of the real tokens), 'sqrt' (sum over the square root of
            their number) or 'cls' (the first token).
        normalize: Scale embeddings to length 1.
        tied: One tower for queries and passages; False gives two.
        released_layer_norm: Only for 'bert', see `BertConfig`.
    """

    encoder: str = "bert"
    encoder_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    pooling: str = "average"
    normalize: bool = False
    tied: bool = True
    released_layer_norm: bool = False

    def __post_init__(self) -> None:
        """Raise `UserError`, naming the gin binding, when a field is out of range."""
        super().__post_init__()
        self._check_one_of("pooling", POOLINGS)
        _ = self.tower

    @property
    def tower(self) -> EncoderConfig:
        """The config of the encoder of one tower.

        Raises:
            UserError: names the binding that does not fit the encoder.
        """
        names = [field.name for field in dataclasses.fields(EncoderConfig)]
        fields = {name: getattr(self, name) for name in (*names, "released_layer_norm")}
        return encoder_config(self.encoder, fields, self.encoder_options, "RetrieverConfig")

    @property
    def max_length(self) -> int:
        """Longest text in tokens."""
        return self.tower.max_length

    @property
    def embedding_dim(self) -> int:
        """Width of an embedding: the encoder's, as there is no projection."""
        return self.hidden_dim
