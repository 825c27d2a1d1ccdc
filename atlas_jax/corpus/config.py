"""Which passages are searched, and how."""

import argparse
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from atlas_jax.core import bounds
from atlas_jax.core.errors import one_of, require
from atlas_jax.core.jsonl import RowsConfig
from atlas_jax.core.paths import is_remote
from atlas_jax.index.scann_index import ScannConfig
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.config import DTYPES

SEARCHERS = ("exact", "scann")
AUTO = "auto"  # CorpusConfig.dtype
INDEX_DTYPES = (AUTO, *DTYPES, "int8")
PASSAGE_SOURCES = ("index", "file", "none")
FROM_LENGTHS = -1  # of ReadConfig.packed_rows and packed_passages
FROM_DTYPE = -1  # of ReadConfig.rerank
AS_OF_FLAG = {"as_of": "CorpusConfig.as_of"}


def add_as_of_flag(parser: argparse.ArgumentParser) -> None:
    """Let `--as_of=VERSION` bind CorpusConfig.as_of, see `AS_OF_FLAG`."""
    parser.add_argument(
        "--as_of",
        metavar="VERSION",
        help="search the passages as of this version or time (CorpusConfig.as_of)",
    )


@dataclass(frozen=True)
class CorpusConfig:
    """Which passages are searched, and how.

    passages: corpus: a file, folder or pattern, or several; needed only while the store does not
        exist yet.
    workers: processes of each host that read and tokenise passages; 0 = one for each core.
    store: directory of the passage store (built from `passages` when missing), on a disk or in a
        bucket (gs://).
    index: directory of a saved index, made by build_index, on a disk or in a bucket; "" embeds the
        corpus at start.
    searcher: 'exact' (on the devices, inside the step) or 'scann' (on the host).
    recall_target: share of a chip's best rows that 'exact' is to find. Below 1 a TPU selects
        approximately, which is faster.
    embed_batch_size: passages per call of the passage tower.
    dtype: type of new embeddings: 'float32', 'bfloat16', 'int8', or 'auto': float32 up to 4 GiB
        of it, int8 beyond, rescored exactly (see docs/int8_index.md). A saved index keeps its own
        type.
    as_of: version of the store that is searched: its number, or a time in ISO 8601 (UTC unless it
        says otherwise); "" = the newest. See docs/living_index.md.
    capacity: rows that the devices have room for, 0 = as many as there are passages. Below it
        passages are added to a loaded index without compiling anything.
    reader_states: folder for the states that a reader's `apart_layers` compute from the passages;
        it is made when it is missing. "" = these layers run again for every question. Takes
        2 x tokens x width bytes a passage, on the disk and on the devices.
    """

    passages: str | tuple[str, ...] = ""
    workers: bounds.AtLeast0 = 0
    store: str = ""
    index: str = ""
    searcher: str = "exact"
    recall_target: Annotated[float, Meta(gt=0, le=1)] = 1.0
    embed_batch_size: bounds.BatchSize = 256
    dtype: str = AUTO
    reader_states: str = ""
    as_of: str | int = ""
    capacity: Annotated[int, Meta(ge=0, le=bounds.LARGEST)] = 0

    def __post_init__(self) -> None:
        bounds.check(self)
        require(
            not is_remote(self.reader_states),
            "CorpusConfig.reader_states",
            self.reader_states,
            "a folder on a disk, since it is memory-mapped",
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
class RecallConfig:
    """How the recall of an approximate search is found, see docs/tasks.md.

    sample: questions of a run that are searched exactly, too, where the search is approximate:
        ScaNN's from ScannConfig.hash_from passages on, CorpusConfig.recall_target below 1, or
        an int8 index whose findings are scored exactly; 0 = none.
    seed: which questions these are.
    least: recall below which `below` happens.
    below: 'warn', or 'stop' the run.
    """

    sample: bounds.AtLeast0 = 100
    seed: bounds.Seed = 0
    least: Annotated[float, Meta(ge=0, le=1)] = 0.0
    below: Literal["warn", "stop"] = "warn"

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the binding."""
        bounds.check(self)


@dataclass(frozen=True)
class CorpusSpec:
    """All settings about the passages of a run.

    Attributes:
      config: where the passages are, and how they are searched.
      formats: the part of a passage that each model sees.
      scann: settings of the host searcher.
      rows: what happens to a broken line of the corpus file.
      recall: how the recall of an approximate search is found.
    """

    config: CorpusConfig = CorpusConfig()
    formats: StoreConfig = StoreConfig()
    scann: ScannConfig = ScannConfig()
    rows: RowsConfig = RowsConfig()
    recall: RecallConfig = RecallConfig()


@dataclass(frozen=True)
class ReadConfig:
    """How many passages are read, and how much of each; bound as ``StepConfig``.

    Attributes:
      k: passages per query that are read.
      reader_length: tokens of one reader input, query + passage + end token.
      rerank: 0, or L > k: search L passages with the index's embeddings, embed them again
        with the present passage tower, and read the k best. Applies to training and
        evaluation. Useful for an int8 index, whose rows are rounded, and for ``joint``
        training, whose index is stale between two refreshes. -1 = 2 k where
        ``CorpusConfig.dtype = 'auto'`` searches an index in int8, else 0.
      packed_rows: rows of ``reader_length`` tokens that the ``k`` passages of a query share, see
        docs/packing.md. -1 = as many as the lengths of questions and passages ask for, where that
        saves a fifth of the rows. 0 = each passage has a row of its own, in the passage tower too.
      packed_passages: rows of ``StoreConfig.retriever_length`` tokens that the ``k`` passages of a
        query share where the passage tower embeds them anew: in ``joint`` training, and with
        ``rerank``. 0 = each passage has a row of its own. -1 = as many as the lengths of the
        passages ask for, unless ``packed_rows`` is 0.
    """

    k: bounds.Passages = 20
    reader_length: bounds.Length = 256
    rerank: Annotated[int, Meta(ge=FROM_DTYPE, le=1 << 20)] = FROM_DTYPE
    packed_rows: Annotated[int, Meta(ge=FROM_LENGTHS, le=1 << 20)] = FROM_LENGTHS
    packed_passages: Annotated[int, Meta(ge=FROM_LENGTHS, le=1 << 20)] = FROM_LENGTHS

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
          UserError: names the field and what it may be.
        """
        bounds.check(self, "StepConfig")
        require(
            self.rerank in (0, FROM_DTYPE) or self.rerank > self.k,
            "StepConfig.rerank",
            self.rerank,
            f"0, or more than StepConfig.k = {self.k}",
        )

    @property
    def packs(self) -> bool:
        """Whether passages share rows where they fit, once both numbers are settled."""
        return self.packed_rows > 0 or self.packed_passages > 0

    def packed_share(self, rows: int, passages: int) -> int:
        """So many rows of ``k`` passages are how many of others; 0 = no fewer than passages."""
        share = -(-rows * passages // self.k)
        return share if 0 < share < passages else 0

    @property
    def searched(self) -> int:
        """Passages per query that the search gives, once `rerank` is settled."""
        return self.rerank if self.rerank > 0 else self.k
