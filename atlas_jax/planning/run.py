"""What gin says of a run that is to be planned. Nothing is read: its paths are not looked at."""

import dataclasses
from typing import Any, Literal

import gin
import jax
import numpy as np

from atlas_jax.answering.batcher import DataConfig
from atlas_jax.answering.config import EvalConfig, RetrieveConfig
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import PartitionRules, Rule
from atlas_jax.corpus.config import CorpusConfig
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.index.int8 import abstract_rows
from atlas_jax.index.store_files import StoreConfig, token_dtype
from atlas_jax.models.parameters import PARTS, Models
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.training.config import RetrieverTrainConfig, StepConfig, TrainConfig
from atlas_jax.training.freshness import refreshes_index
from atlas_jax.training.optimizers import configured_optimizers

LANES = 128  # of a TPU's tile: a row of a matrix takes the room of a multiple of them
# What each entry point compiles, the program that decides on a mesh first.
PROGRAMS = {
    "train": ("train", "embed", "search", "decode"),
    "evaluate": ("decode", "embed", "search"),
    "build_index": ("embed",),
}
# Their step or batch is none of the programs above.
_UNPLANNED = {RetrieverTrainConfig: "train_retriever", RetrieveConfig: "retrieve"}
Entry = Literal["train", "evaluate", "build_index"]


@dataclasses.dataclass(frozen=True)
class Run:
    """What gin says of a run, and how many passages it will search.

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


def run_from_gin(passages: int) -> Run:
    """Everything that a plan needs, from gin's present configuration.

    Raises:
      UserError: the sizes of the reader are not bound, or the run is of a command that has no plan.
    """
    if "vocab_size" not in gin.get_bindings(ReaderConfig):
        raise UserError("plan reads no checkpoint: give the sizes with --gin_file=models/NAME.gin")
    step, retriever, evaluation = StepConfig(), RetrieverConfig(), EvalConfig()
    entry, source = _entry(), evaluation.passages
    if entry == "train":
        source = gin.get_bindings(TrainConfig).get("passages", "index")
    else:
        step = dataclasses.replace(step, retriever_training="fixed")
    if step.retriever_training == "query_side" and retriever.tied:
        retriever = dataclasses.replace(retriever, tied=False)  # as assembly.assemble does
    answer_k = evaluation.k or step.k
    return Run(
        entry=entry,
        refreshes=entry == "train" and refreshes_index(),
        evaluates=entry == "evaluate" or bool(evaluation.file),
        models=Models(T5(ReaderConfig()), DualEncoder(retriever)),
        step=step,
        distillation=DistillationConfig(),
        optimizers=configured_optimizers(PARTS)[0],
        data=DataConfig(),
        store=StoreConfig(),
        corpus=CorpusConfig(),
        generation=GenerationConfig(),
        answer_batch=evaluation.batch_size,
        answer_k=answer_k,
        answer_depth=max(*evaluation.recall_at, answer_k) if evaluation.recall_at else answer_k,
        passage_source=source,
        passages=passages,
        rules=tuple(PartitionRules().rules),
    )


def _entry() -> Entry:
    """Which entry point the bindings are for."""
    for config, command in _UNPLANNED.items():
        if gin.get_bindings(config):
            raise UserError(
                f"{config.__name__} is bound, so this is a run of `{command}`, which has no plan; "
                "those of `train`, `evaluate` and `build_index` have"
            )
    if gin.get_bindings(TrainConfig):
        return "train"
    return "evaluate" if gin.get_bindings(EvalConfig) else "build_index"


def token_type(config: Any) -> np.dtype[Any]:
    """Of the tokens of a model with this config, as they are stored."""
    return token_dtype(config.vocab_size)


def in_lanes(width: int) -> int:
    """What a row of so many entries takes the room of."""
    return -(-width // LANES) * LANES
