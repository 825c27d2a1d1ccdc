"""Warnings, before the work begins, about questions that cannot be scored."""

import logging
from collections.abc import Sequence

from atlas_jax.core import multihost
from atlas_jax.index.passages import PassageStore
from atlas_jax.tasks.base import Example

_LOG = logging.getLogger(__name__)


def tell_unscorable(
    file: str, examples: Sequence[Example], answers: bool, store: PassageStore | None
) -> None:
    """Warn of questions without accepted answers, and of gold passages that no index holds.

    Args:
      file: the file of the examples.
      answers: whether answers are written, to be scored.
      store: what is searched; None = nothing.
    """
    if not multihost.is_first():
        return
    asked = {example.id for example in examples}
    without = {example.id for example in examples if not example.answers}
    if answers and without == asked:
        _LOG.warning("%s has no accepted answers: what is answered is not scored", file)
    elif answers and without:
        _LOG.warning(
            "%s: %d of %d records have no accepted answers (the first is %r); the scores of "
            "answers are those of the others",
            file,
            len(without),
            len(asked),
            next(example.id for example in examples if not example.answers),
        )
    if store is None:
        return
    gold = dict.fromkeys(one for example in examples for one in example.gold_ids)
    absent = [one for one in gold if store.find(one) is None]
    if absent:
        _LOG.warning(
            "%s: %d of %d gold passage ids are not in %s (the first is %r), so they count as not "
            "found; is the file of another corpus?",
            file,
            len(absent),
            len(gold),
            store.directory,
            absent[0],
        )


def within_corpus(recall_at: Sequence[int], store: PassageStore | None) -> tuple[int, ...]:
    """Keep each k of recall@k for which the corpus has enough passages; warn of the others.

    Args:
      store: what is searched; None = nothing.
    """
    if store is None:
        return tuple(recall_at)
    beyond = [k for k in recall_at if k > store.count]
    if beyond and multihost.is_first():
        _LOG.warning(
            "EvalConfig.recall_at: the corpus has %d passages, so recall@%s is left out",
            store.count,
            ", @".join(map(str, beyond)),
        )
    return tuple(k for k in recall_at if k <= store.count)
