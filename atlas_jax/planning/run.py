"""A run that is to be planned. Nothing is read: its paths are not looked at."""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

from atlas_jax.answering.batcher import DataConfig
from atlas_jax.core.partitioning import Rule
from atlas_jax.corpus.config import CorpusConfig
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.index.int8 import abstract_rows
from atlas_jax.index.store_files import StoreConfig, token_dtype
from atlas_jax.models.parameters import Models
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.training.config import StepConfig

LANES = 128  # of a TPU's tile: a row of a matrix takes the room of a multiple of them
# What each entry point compiles, the program that decides on a mesh first.
PROGRAMS = {
    "train": ("train", "embed", "search", "decode"),
    "evaluate": ("decode", "embed", "search"),
    "build_index": ("embed",),
}
Entry = Literal["train", "evaluate", "build_index"]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is told that decides on its programs, and how many passages it will search.

    Attributes:
      entry: the entry point; `evaluate` stands for all that search or answer without training.
      refreshes: whether passages are embedded anew while the index is searched.
      evaluates: whether it answers questions at all.
      answer_batch, answer_k: rows and passages a row when answers are written.
      answer_depth: passages that are found for each of those rows; more where recall asks for it.
    """

    entry: Entry
    refreshes: bool
    evaluates: bool
    models: Models
    step: StepConfig
    distillation: DistillationConfig
    optimizers: Any
    data: DataConfig
    store: StoreConfig
    corpus: CorpusConfig
    generation: GenerationConfig
    answer_batch: int
    answer_k: int
    answer_depth: int
    passage_source: str
    passages: int
    rules: tuple[Rule, ...]

    @property
    def programs(self) -> tuple[str, ...]:
        """What it compiles; the first one decides on a mesh."""
        missing = set() if self.on_devices else {"search"}
        if self.entry == "evaluate" and self.passage_source != "index":
            missing.add("embed")
        return tuple(name for name in PROGRAMS[self.entry] if name not in missing)

    def batch_of(self, program: str) -> tuple[str, int]:
        """Rows of a program's batch, and the binding that sets them."""
        if program == "train":
            return "DataConfig.batch_size", self.data.batch_size
        if program == "embed":
            return "CorpusConfig.embed_batch_size", self.corpus.embed_batch_size
        return "EvalConfig.batch_size", self.answer_batch

    @property
    def answer_searched(self) -> int:
        """Passages that the search gives for each row to be answered."""
        return max(self.answer_depth, self.step.rerank)

    @property
    def on_devices(self) -> bool:
        """Whether the index lies on the chips."""
        return self.passage_source == "index" and self.corpus.searcher == "exact"

    @property
    def row_bytes(self) -> int:
        """Bytes of one passage in the index: embedding and tokens."""
        store, models = self.store, self.models
        width = models.retriever.config.embedding_dim
        embedding = jax.tree.leaves(abstract_rows(1, width, self.corpus.dtype))
        tokens = in_lanes(store.reader_length) * token_type(models.reader.config).itemsize
        if self.step.embeds_passages:
            width = in_lanes(store.retriever_length)
            tokens += width * token_type(models.retriever.config).itemsize
        return sum(leaf.size * leaf.dtype.itemsize for leaf in embedding) + tokens


def token_type(config: Any) -> np.dtype[Any]:
    """The type in which the tokens of a model with this config are stored."""
    return token_dtype(config.vocab_size)


def in_lanes(width: int) -> int:
    """Entries that a row of `width` takes up in memory: `width`, rounded up to whole lanes."""
    return -(-width // LANES) * LANES
