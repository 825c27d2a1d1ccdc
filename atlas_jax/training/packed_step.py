"""The packed rows of a training step, from the lengths of what the run reads."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from atlas_jax.answering.packed_rows import MEASURED, Lengths, lengths_of, packed_rows
from atlas_jax.answering.truncation import evenly
from atlas_jax.index.passages import PassageStore
from atlas_jax.models.assembly import Tokenizers
from atlas_jax.models.parameters import Models
from atlas_jax.training.config import StepConfig
from atlas_jax.training.run import TrainRun


def packed_step(
    told: TrainRun,
    records: Sequence[Any],
    models: Models,
    tokenizers: Tokenizers,
    store: PassageStore | None,
) -> StepConfig:
    """The run's StepConfig with `packed_rows` as a number that follows from no length any more.

    Args:
      records: what is trained on.
      store: the passages; None where nothing is searched.

    Raises:
      UserError: see `packed_rows`.
    """
    config = told.step

    def lengths() -> Lengths | None:
        examples = [told.task.example(records[row]) for row in evenly(len(records), MEASURED)]
        searched = store if told.train.passages == "index" else None
        return lengths_of(examples, tokenizers, told.data, told.corpus.formats, searched)

    at_once = told.data.batch_size // config.accumulate
    rows = packed_rows(config, models, config.k, at_once, lengths)
    return dataclasses.replace(config, packed_rows=rows)
