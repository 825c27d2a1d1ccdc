"""The inputs of a distillation loss, from the reader and from the retriever."""

import dataclasses
from collections.abc import Callable

from atlas_jax.core.types import Array


@dataclasses.dataclass(frozen=True)
class Signals:
    """All inputs of a distillation loss, for the rows of one batch.

    The reader's signals are computed when a loss calls for them, and carry no gradient. The
    retriever's ``scores_bk`` carry one.

    Attributes:
      passage_logprobs: temperature -> float32 [b, k, t], log-probability of each target token read
        from each passage alone; the temperature divides the logits.
      leave_one_out_logprobs: () -> float32 [b, k, t], likewise without each passage.
      cross_attention_mass: () -> float32 [b, k], see `adist.gold_scores`.
      num_decoder_layers: of the reader.
      targets_bt: target tokens, pad 0.
      scores_bk: s = q.p / sqrt(e), before its temperature.
      mask_bk: bool, True where the passage is real.
      weight_b: 1 for a real row, 0 for a padding row.
    """

    passage_logprobs: Callable[[float], Array]
    leave_one_out_logprobs: Callable[[], Array]
    cross_attention_mass: Callable[[], Array]
    num_decoder_layers: int
    targets_bt: Array
    scores_bk: Array
    mask_bk: Array
    weight_b: Array
