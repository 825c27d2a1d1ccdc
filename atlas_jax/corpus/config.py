"""Which passages are searched, and how."""

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from atlas_jax.core import bounds
from atlas_jax.core.errors import one_of, require
from atlas_jax.core.jsonl import RowsConfig
from atlas_jax.core.paths import is_remote
from atlas_jax.index.scann_search import ScannConfig
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.config import DTYPES

SEARCHERS = ("exact", "scann")
INDEX_DTYPES = (*DTYPES, "int8")
PASSAGE_SOURCES = ("index", "file", "none")


@dataclass(frozen=True)
class CorpusConfig:
    """Which passages are searched, and how.

    passages: jsonl corpus; needed only while the store does not exist yet.
    store: directory of the passage store (built from `passages` when missing), on a disk.
    index: directory of a saved index, made by build_index, on a disk; "" embeds the corpus at
        start.
    searcher: 'exact' (on the devices, inside the step) or 'scann' (on the host).
    recall_target: below 1, 'exact' on a TPU selects approximately, and faster: the share of a
        chip's best rows that it is to find.
    embed_batch_size: passages per call of the passage tower.
    dtype: 'float32', 'bfloat16' or 'int8' (see docs/int8_index.md), of embeddings made here; a
        saved index keeps its own.
    reader_states: folder for what a reader's `apart_layers` make of the passages, made when it
        is missing; "" = they are run anew for every question. Takes 2 x tokens x width bytes a
        passage, on the disk and on the devices.
    """

    passages: str = ""
    store: str = ""
    index: str = ""
    searcher: str = "exact"
    recall_target: Annotated[float, Meta(gt=0, le=1)] = 1.0
    embed_batch_size: bounds.BatchSize = 256
    dtype: str = "float32"
    reader_states: str = ""

    def __post_init__(self) -> None:
        bounds.check(self)
        for field in ("store", "index", "reader_states"):
            path = getattr(self, field)
            require(
                not is_remote(path),
                f"CorpusConfig.{field}",
                path,
                "a folder on a disk, since it is memory-mapped; to read it, mount the bucket (as "
                "tpu_scripts/setup.sh --bucket NAME does at /mnt/NAME) and bind the path there; "
                "build it on a disk and copy it",
            )
        require(
            self.searcher in SEARCHERS,
            "CorpusConfig.searcher",
            self.searcher,
            one_of(SEARCHERS),
        )
        require(self.dtype in INDEX_DTYPES, "CorpusConfig.dtype", self.dtype, one_of(INDEX_DTYPES))
        require(
            self.dtype != "int8" or self.searcher == "exact",
            "CorpusConfig.dtype",
            self.dtype,
            "'float32' or 'bfloat16' with CorpusConfig.searcher = 'scann', which compresses by "
            "itself",
        )


@dataclass(frozen=True)
class CorpusSpec:
    """All that is told of the passages of a run.

    Attributes:
      config: where they are, and how they are searched.
      formats: what of a passage each model sees.
      scann: of a host searcher.
      rows: what becomes of a broken line of the corpus file.
    """

    config: CorpusConfig = CorpusConfig()
    formats: StoreConfig = StoreConfig()
    scann: ScannConfig = ScannConfig()
    rows: RowsConfig = RowsConfig()


@dataclass(frozen=True)
class ReadConfig:
    """How many passages are read, and how much of each; bound as ``StepConfig``.

    Attributes:
      k: passages per query that are read.
      reader_length: tokens of one reader input, query + passage + end token.
      rerank: 0, or L > k: search L passages with the index's embeddings, embed these anew
        with the present passage tower, and read the k best of them, in training and in
        evaluation. For an int8 index, whose rows are rounded, and for ``joint`` training, whose
        index is stale between its refreshes.
    """

    k: bounds.Passages = 20
    reader_length: bounds.Length = 512
    rerank: Annotated[int, Meta(ge=0, le=1 << 20)] = 0

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
          UserError: names the field and what it may be.
        """
        bounds.check(self, "StepConfig")
        require(
            self.rerank == 0 or self.rerank > self.k,
            "StepConfig.rerank",
            self.rerank,
            f"0, or more than StepConfig.k = {self.k}",
        )

    @property
    def searched(self) -> int:
        """Passages per query that the search gives."""
        return self.rerank or self.k
