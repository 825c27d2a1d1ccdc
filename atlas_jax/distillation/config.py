"""What the retriever learns from the reader, as one gin dataclass."""

import dataclasses

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError

KL_REDUCTIONS = ("batch", "released")
ADIST_NORMALIZERS = ("released", "target")


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """The distillation loss and its temperatures (arXiv 2208.03299, section 2.2).

    Attributes:
        loss: A name of `table.LOSSES`: 'adist', 'emdr2', 'pdist' or 'loop'.
        gold_temperature: T_gold. Divides the gold scores of adist, pdist and loop; for
            emdr2 it divides the reader's logits, as in the released code.
        score_temperature: T_score. Divides the retriever's scores q.p/sqrt(e).
        kl_reduction: 'batch' averages the divergence over the real rows, as in the paper.
            'released' averages it over rows and passages, as in the released code.
        adist_normalizer: 'released' divides the attention mass by 256 x layers x target
            tokens; 'target' by layers x target tokens alone.
    """

    loss: str = "pdist"
    gold_temperature: bounds.Positive = 0.01
    score_temperature: bounds.Positive = 0.01
    kl_reduction: str = "batch"
    adist_normalizer: str = "released"

    def __post_init__(self) -> None:
        """Raise `UserError`, naming the gin binding, when a field is out of range."""
        from atlas_jax.distillation.table import LOSSES  # whose functions take this class

        bounds.check(self)
        for field, allowed in (
            ("loss", tuple(LOSSES)),
            ("kl_reduction", KL_REDUCTIONS),
            ("adist_normalizer", ADIST_NORMALIZERS),
        ):
            value = getattr(self, field)
            if value not in allowed:
                raise UserError(
                    f"DistillationConfig.{field} = {value!r}: must be one of {', '.join(allowed)}"
                )
