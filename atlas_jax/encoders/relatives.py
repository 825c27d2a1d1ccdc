"""RoBERTa (arXiv 1907.11692) and ELECTRA (arXiv 2003.10555): BERT's layers, other embeddings."""

import dataclasses
from typing import ClassVar

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError
from atlas_jax.encoders.bert import BertConfig


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """A RoBERTa; the defaults are RoBERTa base's.

    In this project the padding token has id 0 and `<s>` has id 1. The released vocabularies have
    them the other way round, so a conversion exchanges the two rows.

    Attributes:
        position_offset: Row of the position table for the first token of a text. The rows before
            it are never read (fairseq counts positions from the padding id + 1).
    """

    vocab_size: bounds.Vocabulary = 50265
    max_positions: bounds.Length = 514
    type_vocab_size: bounds.Width = 1
    layer_norm_eps: bounds.BelowOne = 1e-5
    position_offset: bounds.AtLeast0 = 2

    def __post_init__(self) -> None:
        """Raise `UserError`, naming class and field, when a field is out of range."""
        super().__post_init__()
        if self.position_offset >= self.max_positions:
            raise UserError(
                f"RobertaConfig.position_offset = {self.position_offset}: must be "
                f"less than max_positions = {self.max_positions}"
            )

    @property
    def max_length(self) -> int:
        """Longest text in tokens."""
        return self.max_positions - self.position_offset


@dataclasses.dataclass(frozen=True)
class ElectraConfig(BertConfig):
    """An ELECTRA discriminator or generator; the sizes are BERT base's.

    Attributes:
        factor_dim: Width of the embedding tables. Where it is not hidden_dim, a projection
            follows them.
    """

    TOLD_BY_PARAMETERS: ClassVar[frozenset[str]] = BertConfig.TOLD_BY_PARAMETERS | {"factor_dim"}

    factor_dim: bounds.Width = 128

    @property
    def table_dim(self) -> int:
        """Width of the embedding tables."""
        return self.factor_dim
