"""A text whose parts may be cut, so that it fits into a number of tokens; the rest stays whole."""

import bisect
import dataclasses
from collections.abc import Sequence

from atlas_jax.core.tokenizer import Side, Tokenizer

_SPARE = 8  # where two parts meet, a cut text may have a token more


@dataclasses.dataclass(frozen=True, slots=True)
class Shorten:
    """The part `text[start:end]` that may be cut.

    Attributes:
      start, end: characters of the whole text.
      max_tokens: what the part keeps at most; None = what fits.
      side: the side on which it loses tokens.
    """

    start: int
    end: int
    max_tokens: int | None = None
    side: Side = "left"


def shortened(
    tokenizer: Tokenizer,
    text: str,
    cuts: Sequence[Shorten],
    room: int,
    add_special: bool = False,
) -> str | None:
    """The text, with its longest parts cut first, in at most `room` tokens.

    Args:
      tokenizer: counts the tokens.
      text: the whole text.
      cuts: the parts that may lose tokens, in order; they do not overlap.
      room: tokens of the whole.
      add_special: whether the special tokens around a text count.

    Returns:
      The text; None if what has to stay whole takes more than `room`.
    """
    ends = [0, *(place for cut in cuts for place in (cut.start, cut.end)), len(text)]
    pieces = [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    fixed, parts = pieces[::2], pieces[1::2]
    counts = [len(ids) for ids in tokenizer.encode_batch(parts, False)] if parts else []
    most = [
        count if cut.max_tokens is None else min(count, cut.max_tokens)
        for count, cut in zip(counts, cuts, strict=True)
    ]
    free = room - len(tokenizer.encode("".join(fixed), add_special))
    for spare in range(_SPARE):
        kept = [
            _cut(tokenizer, part, count, cut.side)
            for part, count, cut in zip(parts, _fitted(most, free - spare), cuts, strict=True)
        ]
        whole = "".join(a + b for a, b in zip(fixed, [*kept, ""], strict=True))
        if len(tokenizer.encode(whole, add_special)) <= room:
            return whole
    return None


def _cut(tokenizer: Tokenizer, part: str, count: int, side: Side) -> str:
    """What the part keeps: its beginning or its end."""
    keep = tokenizer.last_tokens if side == "left" else tokenizer.first_tokens
    return keep(part, count)


def _fitted(counts: Sequence[int], room: int) -> list[int]:
    """Counts whose sum is at most `room`: the largest are cut to one level, the others stay."""
    if not counts or sum(counts) <= room:
        return list(counts)
    levels = range(max(counts) + 1)
    level = bisect.bisect_right(levels, room, key=lambda n: sum(min(c, n) for c in counts)) - 1
    fitted = [min(count, max(level, 0)) for count in counts]
    for place, count in enumerate(counts):
        if count > fitted[place] and sum(fitted) < room:
            fitted[place] += 1
    return fitted
