"""Tell on stderr how many texts of a data file are too long for the models and will be cut."""

import sys
from collections.abc import Sequence

import numpy as np

from atlas_jax.answering.batcher import DataConfig
from atlas_jax.core import multihost
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.models.assembly import Tokenizers
from atlas_jax.tasks.base import Example

LOOKED_AT = 2000  # examples, spread evenly over the file


def evenly(count: int, most: int = LOOKED_AT) -> list[int]:
    """Numbers of at most `most` of `count` rows, spread evenly over them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64)).tolist()


def tell_cut(
    file: str,
    examples: Sequence[Example],
    tokenizers: Tokenizers,
    config: DataConfig,
    learnt: bool,
) -> None:
    """Tell how many questions and targets are cut, by which binding, and how long the longest is.

    Args:
      file: the file of the examples.
      examples: of many, only some are looked at.
      learnt: whether targets are learnt; if not, only targets that are choices matter.
    """
    if not examples or not multihost.is_first():
        return
    some = [examples[place] for place in evenly(len(examples))]
    reader, retriever = tokenizers.reader, tokenizers.retriever
    whole = [one.query_text for one in some if not one.shorten]
    asked = [e.retriever_text for e in some if not e.shorten or e.retriever_text != e.query_text]
    targets = [one.target_text for one in some] if learnt else []
    targets += [choice.target_text for one in some for choice in one.choices]
    for kind, lengths, binding in (
        ("questions", _lengths(reader, whole, False), "query_length"),
        ("retriever's questions", _lengths(retriever, asked, True),
         "retriever_query_length"),
        ("answers", _lengths(reader, targets, True), "target_length"),
    ):  # fmt: skip
        limit: int = getattr(config, binding)
        cut = int((lengths > limit).sum())
        if not cut:
            continue
        of = f"{len(lengths):,}" + (" looked at" if len(some) < len(examples) else "")
        effect = "; only their beginnings are learnt" if kind == "answers" and learnt else ""
        print(
            f"{file}: {cut:,} of {of} {kind} are cut to DataConfig.{binding} = {limit} tokens "
            f"(the longest has {int(lengths.max()):,}){effect}",
            file=sys.stderr,
        )


def _lengths(tokenizer: Tokenizer, texts: Sequence[str], add_special: bool) -> np.ndarray:
    rows = tokenizer.encode_batch(list(texts), add_special)
    return np.fromiter(map(len, rows), np.int64, len(rows))
