"""The packed rows of a training step, from the lengths of what the run reads."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from atlas_jax.answering.packed_rows import (
    MEASURED,
    Lengths,
    lengths_of,
    packed_passages,
    packed_rows,
    passage_lengths,
)
from atlas_jax.answering.truncation import evenly
from atlas_jax.index.passages import PassageStore
from atlas_jax.models.assembly import Tokenizers
from atlas_jax.models.parameters import Models
from atlas_jax.tasks.base import Example
from atlas_jax.training.config import StepConfig
from atlas_jax.training.run import TrainRun


def packed_step(
    told: TrainRun,
    records: Sequence[Any],
    models: Models,
    tokenizers: Tokenizers,
    store: PassageStore | None,
) -> StepConfig:
    """The run's StepConfig with numbers of packed rows that follow from no length any more.

    Args:
      records: what is trained on.
      store: the passages; None where nothing is searched.

    Raises:
      UserError: see `packed_rows`.
    """
    config, formats = told.step, told.corpus.formats
    if config.reads:  # rows of a batch that read different numbers of passages
        return dataclasses.replace(config, packed_rows=0, packed_passages=0)
    searched = store if told.train.passages == "index" else None

    @functools.cache
    def examples() -> list[Example]:
        return [told.task.example(records[row]) for row in evenly(len(records), MEASURED)]

    def of_reader() -> Lengths | None:
        return lengths_of(examples(), tokenizers, told.data, formats, searched)

    def of_retriever() -> np.ndarray | None:
        return passage_lengths(examples(), tokenizers, formats, searched)

    at_once = told.data.batch_size // config.accumulate
    rows, shared = packed_rows(config, models, config.k, at_once, of_reader), 0
    if config.embeds_passages and told.train.passages != "none":
        sizes = config.k, at_once, formats.retriever_length
        shared = packed_passages(config, *sizes, of_retriever)
    return dataclasses.replace(config, packed_rows=rows, packed_passages=shared)
