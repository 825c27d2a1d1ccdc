"""Stops a pretraining that has collapsed, with the reason and what helps."""

import math
from collections.abc import Mapping, Sequence

from atlas_jax.core.errors import UserError

LOSSES = ("mlm_loss", "plm_loss")  # of tokens; a run has one of them
_ADVICE = (
    "begin another run with a lower encoder/OptimizerConfig.learning_rate or a longer warmup_steps "
    "(a small ALBERT from nothing also collapses with dropout or without clipping), or from an "
    "earlier checkpoint in another model_dir"
)


class CollapseWatch:
    """Looks at each line of metrics, for `Loop.watch`.

    ALBERT's first users saw its loss jump half-way and never come back. A run that does so costs
    days unless it is stopped.
    """

    def __init__(
        self, jump: float, patience: int, log_every: int, lowest: float = math.inf
    ) -> None:
        """Begin to watch.

        Args:
          jump: nats above the lowest loss; 0 = do not look at losses.
          patience: lines in a row that have to be bad.
          log_every: steps between two lines.
          lowest: loss of the run's earlier part, of a resumed one.
        """
        self._jump, self._patience, self._every = jump, patience, log_every
        self._lowest, self._high, self._idle, self._skipped = lowest, 0, 0, 0

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a line.

        Raises:
          UserError: the run has failed; says since when and what helps.
        """
        skipped = int(values["skipped"])
        self._idle = self._idle + 1 if skipped - self._skipped >= self._every else 0
        self._skipped = skipped
        if self._idle >= self._patience:
            raise UserError(
                f"the last {self._idle * self._every} steps to step {step} were skipped: loss or "
                f"gradient is not finite any more; {_ADVICE}"
            )
        loss = float(next(values[name] for name in LOSSES if name in values))
        if not math.isfinite(loss):
            return  # a skipped step
        self._lowest = min(self._lowest, loss)
        is_high = self._jump > 0 and loss > self._lowest + self._jump
        self._high = self._high + 1 if is_high else 0
        if self._high >= self._patience:
            raise UserError(
                f"the MLM loss is {loss:.2f} at step {step}, and for {self._high} lines of metrics "
                f"has been more than EncoderTrainConfig.stop_at_jump = {self._jump} above its "
                f"lowest, {self._lowest:.2f}: the run has collapsed; {_ADVICE}"
            )


def lowest_loss(rows: Sequence[Mapping[str, float]]) -> float:
    """The lowest token loss of a run's lines of metrics; infinite without any."""
    found = [row.get(f"train/{name}") for row in rows for name in LOSSES]
    return min((loss for loss in found if loss is not None), default=math.inf)
