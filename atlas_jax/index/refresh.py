"""When to embed the corpus anew: training changes the passage encoder.

Query-side training does not change it and needs no refresh. Joint training refreshes the whole
index by a schedule, or a slice of it at a time (rolling), or both.
"""

import dataclasses
import re

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class RefreshRange:
    """Refresh at ``first`` and every ``every`` steps from there before ``end`` (None: for ever)."""

    first: int
    end: int | None
    every: int


@dataclasses.dataclass(frozen=True)
class RefreshPolicy:
    """Refreshes of the index by the step number.

    Attributes:
      schedule: when the whole index is refreshed; training waits for it. "-1": never. "1000":
        every 1000 steps. "0-1000:500,1000-10000:2000": every 500 steps before step 1000, then
        at step 1000 and every 2000 steps from there before step 10000, then never. As in
        Atlas, a range counts from its own first step.
      rolling_rows: number of passages in a slice; 0 = no slices. A slice is embedded anew on the
        devices while training goes on. The first slice follows after the last.
      rolling_every: steps from one such slice to the next.
    """

    schedule: str | int = "-1"
    rolling_rows: bounds.AtLeast0 = 0
    rolling_every: bounds.AtLeast1 = 1

    def __post_init__(self) -> None:
        """Refuse a schedule that does not parse, and numbers out of range.

        Raises:
          UserError: names the binding and the part at fault.
        """
        bounds.check(self)
        parse_schedule(self.schedule)

    @property
    def refreshes(self) -> bool:
        """Whether anything is ever refreshed."""
        return bool(parse_schedule(self.schedule)) or self.rolling_rows > 0

    def due(self, step: int, frozen_steps: int = 0) -> bool:
        """Whether to refresh once ``step`` steps are done.

        Never after step 0: the index is fresh. Never up to ``frozen_steps`` either: in these first
        steps the passage tower does not change.
        """
        return step > frozen_steps and any(
            part.first <= step
            and (part.end is None or step < part.end)
            and (step - part.first) % part.every == 0
            for part in parse_schedule(self.schedule)
        )

    def rolls(self, step: int, frozen_steps: int = 0) -> bool:
        """Whether to refresh a slice once ``step`` steps are done; exceptions as in ``due``."""
        return self.rolling_rows > 0 and step > frozen_steps and step % self.rolling_every == 0

    def round_steps(self, count: int) -> int:
        """Steps until every one of ``count`` passages has been in a slice.

        This bounds the staleness: no embedding is older than this number of steps.
        """
        return -(-count // self.rolling_rows) * self.rolling_every


def parse_schedule(schedule: str | int) -> tuple[RefreshRange, ...]:
    """Parse a schedule; see ``RefreshPolicy.schedule``.

    Raises:
      UserError: names the part at fault.
    """
    text = str(schedule).strip()  # without quotes, gin reads 1000 and -1 as numbers
    if text == "-1":
        return ()
    if re.fullmatch(r"[1-9]\d*", text):
        return (RefreshRange(0, None, int(text)),)
    ranges: list[RefreshRange] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)-(\d+):([1-9]\d*)\s*", part)
        if match is None:
            raise UserError(
                f"RefreshPolicy.schedule = {schedule!r}: {part.strip()!r} is not FIRST-END:EVERY; "
                'write "-1" for never, "1000" for every 1000 steps, or ranges such as '
                '"0-1000:500,1000-10000:2000"'
            )
        first, end, every = map(int, match.groups())
        if first >= end or (ranges and first < (ranges[-1].end or 0)):
            raise UserError(
                f"RefreshPolicy.schedule = {schedule!r}: the range {first}-{end} is empty or "
                "begins before the one in front of it ends"
            )
        ranges.append(RefreshRange(first, end, every))
    return tuple(ranges)
