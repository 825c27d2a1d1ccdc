"""The type of an index where no setting names it, and how its rounding is corrected.

This is the one place that decides. A large index is rounded to 8 bits. Then more passages are
searched than are wanted, embedded again, and the best of these are kept: exact rescoring.
"""

import dataclasses
import sys
from typing import TypeVar

from atlas_jax.core import multihost
from atlas_jax.core.errors import UserError
from atlas_jax.corpus.config import AUTO, FROM_DTYPE, CorpusConfig, ReadConfig
from atlas_jax.index.int8 import INT8
from atlas_jax.index.living import LivingStore
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.segment_indices import index_dtype

Read = TypeVar("Read", bound=ReadConfig)

# Bytes of an index in float32: a quarter of the smallest chip's memory (v5e: 16 GiB), which leaves
# room for models, tokens and activations on a single one.
INT8_ABOVE = 4 << 30
RESCORED = 2  # times as many as are wanted; 1.5 were enough in docs/reports/int8_recall.md


def new_dtype(config: CorpusConfig, count: int, width: int) -> str:
    """The type in which so many passages are embedded: CorpusConfig.dtype, or what it stands for.

    ScaNN compresses by itself and gets float32.
    """
    if config.dtype != AUTO:
        return config.dtype
    large = 4 * count * width > INT8_ABOVE
    return INT8 if large and config.searcher == "exact" else "float32"


def searched_dtype(config: CorpusConfig, store: PassageStore, width: int) -> str:
    """The type in which a store will be searched: the saved index's own, or that of a new one."""
    if config.index and isinstance(store, LivingStore):
        try:
            return index_dtype(config.index, store)
        except UserError:  # it does not exist yet, or it is damaged: that is told when it is read
            pass
    return new_dtype(config, store.count, width)


def built_dtype(config: CorpusConfig, store: PassageStore, width: int) -> str:
    """The type in which all segments of a store are to be embedded, told where it was chosen.

    An index that is there keeps its own, unless another one is bound.
    """
    if config.dtype != AUTO:
        return config.dtype
    tell_chosen(config, store.count, width)
    return searched_dtype(config, store, width)


def is_chosen(config: CorpusConfig, dtype: str) -> bool:
    """Whether an index is in 8 bits by default, not by a setting; its rows are then rescored."""
    return config.dtype == AUTO and dtype == INT8


def settled_rerank(rerank: int, k: int, config: CorpusConfig, dtype: str) -> int:
    """`rerank` as a fixed number; `FROM_DTYPE` becomes what the index needs.

    Args:
      rerank: of StepConfig or RetrieveConfig.
      k: passages that are wanted.
      dtype: of the index; "" = nothing is searched.
    """
    if rerank != FROM_DTYPE:
        return rerank
    return RESCORED * k if is_chosen(config, dtype) else 0


def settled(read: Read, config: CorpusConfig, store: PassageStore | None, width: int) -> Read:
    """The settings of a training step with `rerank` as a number, see `settled_rerank`.

    Args:
      store: None = nothing is searched.
      width: of an embedding.
    """
    dtype = "" if store is None else searched_dtype(config, store, width)
    return dataclasses.replace(read, rerank=settled_rerank(read.rerank, read.k, config, dtype))


def needs_tokens(rerank: int) -> bool | None:
    """Whether re-ranking needs the retriever's tokens; None = where rows are rescored by choice."""
    return None if rerank == FROM_DTYPE else rerank > 0


def tell_chosen(config: CorpusConfig, count: int, width: int) -> None:
    """Say on stderr that a new index will be in 8 bits, if that was chosen here."""
    if is_chosen(config, new_dtype(config, count, width)) and multihost.is_first():
        print(
            f"{count:,} passages of {width} numbers take more than {INT8_ABOVE / 2**30:.2g} GiB in "
            f"float32: the index is in int8, and {RESCORED} times as many passages are searched as "
            "are wanted, then scored exactly (CorpusConfig.dtype = 'auto', StepConfig.rerank = "
            f"{FROM_DTYPE})",
            file=sys.stderr,
        )
