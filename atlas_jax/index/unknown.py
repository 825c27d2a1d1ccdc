"""Check that the tokenizers know the script of a corpus; a Latin one cannot read Chinese."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer

_LOOKED_AT = 2000  # passages, spread evenly over the corpus
_CHARACTERS = 10_000  # of a passage; a tokenizer takes hundreds of bytes for each
_WORTH_TELLING = 0.02  # share of unknown characters from which it is told
_UNREAD = 0.5  # share of unknown characters from which a passage counts as unreadable
_UNUSABLE = 0.5  # share of unreadable passages from which the corpus is refused


def check_scripts(
    count: int,
    read: Callable[[Sequence[int]], list[dict[str, Any]]],
    tokenizers: Mapping[str, Tokenizer],
) -> None:
    """Tell on stderr what share of a corpus's characters each tokenizer does not know.

    Args:
      count: of the passages.
      read: gives the passages of some rows.
      tokenizers: by tower.

    Raises:
      UserError: one tokenizer knows next to nothing of most passages; names an example.
    """
    rows = np.unique(np.linspace(0, count - 1, min(count, _LOOKED_AT)).astype(np.int64))
    passages = read(rows.tolist())
    texts = [passage["text"][:_CHARACTERS] for passage in passages]
    for tower, tokenizer in tokenizers.items():
        shares = np.array(tokenizer.unknown_shares(texts))
        if shares.mean() <= _WORTH_TELLING:
            continue
        worst = passages[int(shares.argmax())]
        unread = int((shares >= _UNREAD).sum())
        told = (
            f"the {tower}'s tokenizer does not know {shares.mean():.0%} of the characters of "
            f"{len(texts):,} passages looked at, and next to nothing of {unread:,} of them "
            f"(passage {worst['id']!r}: {worst['text'][:40]!r})"
        )
        if unread > _UNUSABLE * len(texts):
            raise UserError(f"{told}; take a model whose tokenizer has this script")
        print(told, file=sys.stderr)
