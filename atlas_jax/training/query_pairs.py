"""Pairs of a task's queries and their gold passages, for the retriever's training."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jax.sharding import Sharding

from atlas_jax.answering.truncation import evenly
from atlas_jax.core.errors import UserError
from atlas_jax.core.multihost import local_rows
from atlas_jax.index.passages import PassageStore
from atlas_jax.models.assembly import Tokenizers
from atlas_jax.tasks.base import Example
from atlas_jax.training.config import RetrieverTrainConfig
from atlas_jax.training.run import RetrieverRun

_CHECKED = 100_000  # records that are checked before the first step


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of each batch that a process makes.

    Attributes:
      queries: of the batch's queries.
      passages: of its passages: a gold one for each query, then the hard negatives.
    """

    queries: Sequence[int]
    passages: Sequence[int]

    @classmethod
    def of(cls, rows: Sharding, config: RetrieverTrainConfig) -> "Share":
        """What this process's devices hold of batches with this sharding."""
        sizes = (config.batch_size, config.passages_in_batch)
        return cls(*(local_rows(rows, size) for size in sizes))

    @classmethod
    def whole(cls, config: RetrieverTrainConfig) -> "Share":
        """Everything."""
        return cls(range(config.batch_size), range(config.passages_in_batch))


def query_pairs(
    store: PassageStore, tokenizers: Tokenizers, told: RetrieverRun, share: Share
) -> Any:
    """Endless (query tokens, rows of passages) of this process; groups of records stay together.

    The rows of a batch are first the gold passage of each query, then `hard_negatives` of the
    negatives of each. A query and its negatives depend only on the seed and the place in the
    stream. Records at the end of the file that do not fill a group are left out.

    Raises:
      UserError: there are too few records, or one names no passage of the store.
    """
    pairs, config = _Pairs(store, tokenizers, told, share), told.train
    stream = grain.MapDataset.range(pairs.groups).seed(config.seed).shuffle().repeat()
    # The stream has no end, so nothing is dropped; but its length, rounded up, would overflow.
    batches = stream.batch(config.batch_size // config.group, drop_remainder=True, batch_fn=list)
    made = batches.map_with_index(pairs.batch)
    return iter(made.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


class _Pairs:
    """Makes this process's share of a batch from the numbers of its groups."""

    def __init__(
        self, store: PassageStore, tokenizers: Tokenizers, told: RetrieverRun, share: Share
    ) -> None:
        assert told.task is not None
        self.store, self.tokenizer, self.share = store, tokenizers.retriever, share
        self.task, self.config, self.data = told.task, told.train, told.data
        self.records = told.task.load(told.train.file, rows=told.rows)
        self.groups = len(self.records) // self.config.group
        if self.groups * self.config.group < self.config.batch_size:
            raise UserError(
                f"RetrieverTrainConfig.batch_size = {self.config.batch_size} is more than the "
                f"{len(self.records)} records of {self.config.file} (in groups of "
                f"{self.config.group})"
            )
        self._check()

    def _check(self) -> None:
        """Find faulty records before the first step."""
        for place in evenly(len(self.records), _CHECKED):
            example = self.task.example(self.records[place])
            self.store.row_of(self._gold_id(example))
            for passage_id in self._negatives(example, np.random.default_rng(0)):
                self.store.row_of(str(passage_id))

    def batch(self, step: int, groups: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of this process's queries, and the store's rows of its passages."""
        size, asked = self.config.group, [self._asks(place) for place in self.share.passages]
        made: dict[int, tuple[Example, list[str]]] = {}  # by the batch's rows
        for at in sorted({row // size for row in (*self.share.queries, *(r for r, _ in asked))}):
            pairs = self._examples(step * len(groups) + at, int(groups[at]))
            made.update(zip(range(at * size, (at + 1) * size), pairs, strict=True))
        texts = [made[row][0].retriever_text for row in self.share.queries]
        ids = self.tokenizer.encode_batch(texts, True)
        length, side = self.data.retriever_query_length, self.data.truncate_query  # as Batcher
        wanted = (self._gold_id(made[r][0]) if n is None else made[r][1][n] for r, n in asked)
        rows = np.array([self.store.row_of(str(passage_id)) for passage_id in wanted])
        return self.tokenizer.pad_to(ids, length, side), rows

    def _asks(self, place: int) -> tuple[int, int | None]:
        """The query that a passage is for, and which of its hard negatives it is, if any."""
        beyond = place - self.config.batch_size
        return (place, None) if beyond < 0 else divmod(beyond, self.config.hard_negatives)

    def _examples(self, index: int, group: int) -> list[tuple[Example, list[str]]]:
        """The queries of a group with their hard negatives, at this place in the stream."""
        rng = np.random.Generator(np.random.Philox(key=[self.config.seed, index]))
        size = self.config.group
        chosen = self.records[group * size : (group + 1) * size]
        examples = [self.task.example(record, rng) for record in chosen]
        return [(example, self._negatives(example, rng)) for example in examples]

    def _negatives(self, example: Example, rng: np.random.Generator) -> list[str]:
        hard = self.config.hard_negatives
        if not hard:
            return []
        if not example.negative_ids:
            raise UserError(
                f"{self.config.file}: record {example.id!r} has no field 'negatives', from which "
                f"RetrieverTrainConfig.hard_negatives = {hard} are drawn"
            )
        few = len(example.negative_ids) < hard  # then some are drawn twice
        return list(rng.choice(example.negative_ids, hard, replace=few))

    def _gold_id(self, example: Example) -> str:
        if not example.gold_ids:
            raise UserError(
                f"{self.config.file}: record {example.id!r} names no gold passage to be paired "
                f"with (RetrieverTrainConfig.task = {self.config.task!r})"
            )
        return example.gold_ids[0]
