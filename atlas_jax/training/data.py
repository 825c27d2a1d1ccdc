"""From records to token batches of one static shape, in an order that can be resumed."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import gin
import grain
import jax
import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Side
from atlas_jax.core.types import EOS_ID, NO_ROW, Batch, Passages
from atlas_jax.index.passages import PassageStore, StoreConfig
from atlas_jax.tasks.base import Example, PassageText, Task
from atlas_jax.training.assembly import Tokenizers

_PREFETCH = 4  # batches made ahead of the step, by one thread


@gin.configurable
@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Shapes of a batch.

    Attributes:
      batch_size: queries of a training step, over all processes.
      query_length: reader tokens of the query.
      retriever_query_length: retriever tokens of the query, special tokens included.
      target_length: reader tokens of the target, end token included.
      truncate_query: the side on which a query that is too long loses tokens. The
        default, 'left', keeps the sentinel that ends a question.
      max_excluded: rows that one query may forbid.
    """

    batch_size: int = 32
    query_length: int = 64
    retriever_query_length: int = 64
    target_length: int = 16
    truncate_query: Side = "left"
    max_excluded: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes below 1 and other sides.

        Raises:
          UserError: names the binding.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "truncate_query":
                if value not in ("left", "right"):
                    raise UserError(
                        f"DataConfig.truncate_query = {value!r}: expected 'left' or 'right'"
                    )
            elif value < 1:
                raise UserError(f"DataConfig.{field.name} = {value!r}: expected 1 or more")


class Batcher:
    """Turns examples into a `Batch`, tokenising each kind of text in one call.

    Used by training, evaluation and `ask` alike, so that a question is the same tokens
    everywhere.
    """

    def __init__(
        self,
        tokenizers: Tokenizers,
        config: DataConfig,
        store: PassageStore | None = None,
        given_passages: int = 0,
        formats: StoreConfig | None = None,
    ) -> None:
        """Fix the shapes.

        Args:
          tokenizers: of both models.
          config: the lengths.
          store: where the rows of excluded ids are looked up; an id that it lacks, or any
            id without a store, excludes nothing.
          given_passages: k > 0 puts the examples' own passages into `Batch.given`, the
            first k of each; row numbers are then places in the example's list.
          formats: text and lengths of given passages; what gin says if None.

        Raises:
          UserError: the reader's end token is not the one that models know.
        """
        if tokenizers.reader.eos_id != EOS_ID:
            raise UserError(
                f"the reader's end token </s> has id {tokenizers.reader.eos_id}, but must have "
                f"{EOS_ID}, as in every T5"
            )
        self._tokenizers = tokenizers
        self._config = config
        self._store = store
        self._k = given_passages
        self._formats = (formats or StoreConfig()) if given_passages else None

    def __call__(self, examples: Sequence[Example], rows: int | None = None) -> Batch:
        """Make a batch of the examples.

        Args:
          examples: at least one.
          rows: rows of the batch. Those without an example repeat the first one's query,
            since every row has to be computable, with an empty target and weight 0.
            None = as many as there are examples.

        Raises:
          UserError: an example has no passages where given ones are asked for, or
            excludes too many.
          ValueError: there are no examples, or more than rows.
        """
        rows = len(examples) if rows is None else rows
        if not 0 < len(examples) <= rows:
            raise ValueError(f"{len(examples)} examples for a batch of {rows} rows")
        config, tokenizers = self._config, self._tokenizers
        reader, retriever = tokenizers.reader, tokenizers.retriever
        queries = reader.encode_batch([e.query_text for e in examples], add_special=False)
        asked = retriever.encode_batch([e.retriever_text for e in examples], add_special=True)
        targets = reader.encode_batch([e.target_text for e in examples], add_special=True)
        side = config.truncate_query
        # Rows beyond the examples take the first one's content.
        take = np.arange(rows)
        is_real_b = take < len(examples)
        take = np.where(is_real_b, take, 0)
        targets_bt = reader.pad_to(targets, config.target_length)[take]
        given = self._given(examples) if self._k else None
        return Batch(
            query_tokens_bq=reader.pad_to(queries, config.query_length, side)[take],
            retriever_tokens_br=retriever.pad_to(asked, config.retriever_query_length, side)[take],
            target_tokens_bt=np.where(is_real_b[:, None], targets_bt, 0),
            excluded_rows_bx=self._excluded(examples)[take],
            weight_b=is_real_b.astype(np.float32),
            given=jax.tree.map(lambda leaf: leaf[take], given),
        )

    def _excluded(self, examples: Sequence[Example]) -> np.ndarray:
        width = self._config.max_excluded
        excluded_bx = np.full((len(examples), width), NO_ROW, np.int32)
        for row, example in enumerate(examples):
            if len(example.excluded_ids) > width:
                raise UserError(
                    f"record {example.id!r} excludes {len(example.excluded_ids)} passages, more "
                    f"than DataConfig.max_excluded = {width}"
                )
            for place, passage_id in enumerate(example.excluded_ids):
                excluded_bx[row, place] = self._row_of(passage_id)
        return excluded_bx

    def _row_of(self, passage_id: str) -> int:
        if self._store is None:
            return NO_ROW
        try:
            return self._store.row_of(passage_id)
        except UserError:  # the passage is not in this corpus, so it cannot be found either
            return NO_ROW

    def _given(self, examples: Sequence[Example]) -> Passages:
        formats = self._formats
        assert formats is not None
        lists = [_passages_of(example)[: self._k] for example in examples]
        flat = list(itertools.chain.from_iterable(lists))
        counts_b = np.array([len(passages) for passages in lists])
        mask_bk = np.arange(self._k) < counts_b[:, None]

        def spread(tokens_nl: np.ndarray) -> np.ndarray:
            tokens_bkl = np.zeros((*mask_bk.shape, tokens_nl.shape[1]), np.int32)
            tokens_bkl[mask_bk] = tokens_nl
            return tokens_bkl

        def encode(part: str) -> np.ndarray:
            tokenizer = getattr(self._tokenizers, part)
            texts = [getattr(formats, f"{part}_format").format(**passage) for passage in flat]
            ids = tokenizer.encode_batch(texts, add_special=part == "retriever")
            return spread(tokenizer.pad_to(ids, getattr(formats, f"{part}_length")))

        return Passages(
            rows_bk=np.where(mask_bk, np.arange(self._k), NO_ROW).astype(np.int32),
            scores_bk=np.where(mask_bk, 0.0, -np.inf).astype(np.float32),
            reader_tokens_bkl=encode("reader"),
            retriever_tokens_bkm=encode("retriever"),
            mask_bk=mask_bk,
        )


def training_batches(
    task: Task,
    records: Sequence[Any],
    batcher: Callable[[Sequence[Example]], Batch],
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Any:
    """Endless training batches, the records shuffled anew in each epoch.

    What an example is depends on the seed and its place in the endless stream alone, so a
    stream that goes on from a saved state, or that several processes share, gives just the
    examples of the uninterrupted, single one.

    Args:
      task: makes the examples; it is told the training step they are for.
      records: what `task.load` returned.
      batcher: makes a batch of this process's examples.
      batch_size: examples of a step over all processes; this one gets its share.
      seed: of order and masking, from 0 to 2**32 - 1.
      process_index: of this process; it gets every process_count-th example.
      process_count: number of processes.

    Returns:
      A grain iterator of `Batch` (numpy) with `get_state()` and `set_state(state)`; the
      state is a small dict of JSON values.

    Raises:
      UserError: the batch cannot be shared equally, or the seed is out of range.
    """
    if batch_size % process_count:
        raise UserError(
            f"DataConfig.batch_size = {batch_size} cannot be shared by {process_count} processes"
        )
    if not 0 <= seed < 1 << 32:
        raise UserError(f"the seed is {seed}, but must be from 0 to 2**32 - 1")

    def make_example(index: int, record: Any) -> Example:
        rng = np.random.Generator(np.random.Philox(key=[seed, index]))
        return task.example(record, rng, step=index // batch_size)

    stream = grain.MapDataset.source(records).seed(seed).shuffle().repeat()
    examples = stream.map_with_index(make_example)[process_index::process_count]
    batches = examples.batch(batch_size // process_count, drop_remainder=True, batch_fn=batcher)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)
    return iter(batches.to_iter_dataset(options))


def _passages_of(example: Example) -> tuple[PassageText, ...]:
    if example.given_passages is None:
        raise UserError(
            f"record {example.id!r} has no field 'passages', from which its passages shall come"
        )
    return example.given_passages
