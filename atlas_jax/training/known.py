"""Leave out unlabelled lines whose text also stands in a run's labelled or evaluation file."""

import sys
from collections.abc import Sequence
from typing import Protocol

from atlas_jax.core import multihost
from atlas_jax.core.errors import UserError
from atlas_jax.tasks.base import Record


class Files(Protocol):
    """The files that a config names."""

    @property
    def file(self) -> str:
        """Labelled lines."""

    @property
    def unlabelled_file(self) -> str:
        """Lines without labels."""

    @property
    def eval_file(self) -> str:
        """Lines to score; '' = none."""


def without_known(
    records: Sequence[Record], known: Sequence[Record], asks: Sequence[str], config: Files
) -> list[Record]:
    """The records whose text no known record has.

    Args:
      records: of `config.unlabelled_file`.
      known: of its other files.
      asks: names of a record's texts.
      config: names the files, for messages.

    Raises:
      UserError: none is left.
    """

    def text(record: Record) -> tuple[str, ...]:
        return tuple(" ".join(str(record.fields[name]).lower().split()) for name in asks)

    seen = {text(record) for record in known}
    kept = [record for record in records if text(record) not in seen]
    if not kept:
        raise UserError(
            f"{config.unlabelled_file}: every line is one of {config.file} or "
            f"{config.eval_file or 'the evaluation file'}, so none is left to learn from"
        )
    if len(kept) < len(records) and multihost.is_first():
        left = len(records) - len(kept)
        print(f"{config.unlabelled_file}: {left} known lines are left out", file=sys.stderr)
    return kept
