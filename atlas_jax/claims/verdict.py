"""Whether a run shows what the paper claims: one rule for all rows."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal

Expects = Literal["more", "alike"]

SHOWN, NOT_SHOWN, OPPOSITE, ONE_SEED, NOT_RUN = (
    "shown",
    "not shown",
    "opposite",
    "one seed",
    "not run",
)
RULE = """\
A difference of two means counts if it is greater than the pooled spread of the two rows,
and also greater than one question of the sample. The pooled spread is the root of the mean of their
variances over the seeds.

* "More than" is *shown* by a difference that counts, and *opposite* if it counts the other way.
  Otherwise it is *not shown*.
* "Like" is *shown* if the difference does not count and at least one row answers more than one
  question correctly. Otherwise it is *not shown*.
* With fewer than two seeds there is no spread, and no verdict."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation over the seeds; the latter is None for one seed."""

    mean: float
    spread: float | None
    seeds: int


def summarise(values: Sequence[float]) -> Summary | None:
    """Of one row's scores, one a seed; None without any."""
    if not values:
        return None
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.fmean(values), spread, len(values))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the rule says of two rows.

    Attributes:
      verdict: SHOWN, NOT_SHOWN, OPPOSITE, ONE_SEED or NOT_RUN.
      difference: of the means; None where a row has not run.
      threshold: what the difference has to exceed; None where a spread is missing.
    """

    verdict: str
    difference: float | None = None
    threshold: float | None = None


def judge(row: Summary | None, against: Summary | None, expects: Expects, floor: float) -> Verdict:
    """Apply RULE.

    Args:
      row, against: the two rows' scores.
      expects: of `row`, compared with `against`.
      floor: the least difference that counts: one question of the sample.
    """
    if row is None or against is None:
        return Verdict(NOT_RUN)
    difference = row.mean - against.mean
    if row.spread is None or against.spread is None:
        return Verdict(ONE_SEED, difference)
    pooled = math.sqrt((row.spread**2 + against.spread**2) / 2)
    threshold = max(pooled, floor)
    if expects == "alike":
        something = max(row.mean, against.mean) > floor
        found = SHOWN if something and abs(difference) <= threshold else NOT_SHOWN
    elif abs(difference) <= threshold:
        found = NOT_SHOWN
    else:
        found = SHOWN if difference > 0 else OPPOSITE
    return Verdict(found, difference, threshold)
