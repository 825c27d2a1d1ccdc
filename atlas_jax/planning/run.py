"""A run to be planned. None of its files is read."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from atlas_jax.answering.batcher import DataConfig
from atlas_jax.core.partitioning import Rule
from atlas_jax.corpus.config import CorpusConfig
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.encoders.model import EncoderModelConfig
from atlas_jax.index.int8 import abstract_rows
from atlas_jax.index.store_files import StoreConfig, token_dtype
from atlas_jax.models.parameters import Models
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.training.config import OptimizerConfig, StepConfig
from atlas_jax.training.pretrain_config import PretrainRun

LANES = 128  # width of a TPU's tile: rows of a matrix are padded to a multiple of it
# Programs of each entry point. The first one decides which mesh is best.
PROGRAMS = {
    "train": ("train", "embed", "search", "decode"),
    "evaluate": ("decode", "embed", "search"),
    "build_index": ("embed",),
    "pretrain_encoder": ("pretrain",),
}
Entry = Literal["train", "evaluate", "build_index"]


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings of a run that decide its programs, and the number of passages it searches.

    Attributes:
      entry: the entry point; `evaluate` stands for all that search or answer without training.
      refreshes: whether passages are embedded anew while the index is searched.
      answer_batch, answer_k: rows of a batch, and passages read for each, when it answers.
      answer_depth: passages found for each of these rows; recall may need more than are read.
    """

    entry: Entry
    refreshes: bool
    models: Models
    step: StepConfig
    distillation: DistillationConfig
    optimizers: dict[str, OptimizerConfig]
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
        """Names of its programs; the first one decides which mesh is best."""
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
        """Passages that the search finds for each question."""
        return max(self.answer_depth, self.step.rerank)

    @property
    def on_devices(self) -> bool:
        """Whether the index is on the chips."""
        return self.passage_source == "index" and self.corpus.searcher == "exact"

    @property
    def heads(self) -> dict[str, int]:
        """Attention heads by the config that sets them."""
        reader, retriever = self.models.reader.config, self.models.retriever.config
        return {"ReaderConfig": reader.num_heads, "RetrieverConfig": retriever.num_heads}

    @property
    def without_remat(self) -> "Run":
        """The same run, which keeps all activations.

        Fused attention computes its logits again for the backward pass, so it is replaced too.
        """
        reader = dataclasses.replace(
            self.models.reader.config, remat_policy="none", attention="xla"
        )
        retriever = dataclasses.replace(
            self.models.retriever.config, remat_policy="none", attention="xla"
        )
        models = Models(T5(reader), DualEncoder(retriever))
        return dataclasses.replace(self, models=models)

    @property
    def told(self) -> dict[str, Any]:
        """Settings that a report names."""
        return {
            "passages": self.passages if self.on_devices else 0,
            "index_dtype": self.corpus.dtype,
            "batch_size": self.data.batch_size,
            "k": self.step.k,
            "reader_length": self.step.reader_length,
        }

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


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """A run of `pretrain_encoder`, as `Run` is one of the others.

    Attributes:
      pretraining: its settings.
      encoder: the config of its encoder, with the heads that the objectives need.
    """

    pretraining: PretrainRun
    encoder: EncoderModelConfig
    rules: tuple[Rule, ...]

    entry: ClassVar[str] = "pretrain_encoder"
    programs: ClassVar[tuple[str, ...]] = PROGRAMS["pretrain_encoder"]
    refreshes: ClassVar[bool] = False
    on_devices: ClassVar[bool] = False
    row_bytes: ClassVar[int] = 0

    def batch_of(self, program: str) -> tuple[str, int]:
        """As `Run.batch_of`."""
        del program
        return "EncoderTrainConfig.batch_size", self.pretraining.train.batch_size

    @property
    def heads(self) -> dict[str, int]:
        """As `Run.heads`."""
        return {"EncoderModelConfig": self.encoder.num_heads}

    @property
    def without_remat(self) -> "Pretraining":
        """As `Run.without_remat`."""
        return dataclasses.replace(
            self, encoder=dataclasses.replace(self.encoder, remat_policy="none", attention="xla")
        )

    @property
    def told(self) -> dict[str, Any]:
        """As `Run.told`."""
        train = self.pretraining.train
        return {
            "batch_size": train.batch_size, "length": train.length,
            "objectives": list(train.objectives),
        }  # fmt: skip


AnyRun = Run | Pretraining


def token_type(config: Any) -> np.dtype[Any]:
    """Type of the stored tokens for a model with this config."""
    return token_dtype(config.vocab_size)


def in_lanes(width: int) -> int:
    """Entries of memory for a row of `width`: `width`, rounded up to a multiple of LANES."""
    return -(-width // LANES) * LANES
