"""What the entry points are told: frozen dataclasses that gin fills.

Each entry point reads `ModelConfig` (where reader, retriever and tokenizers come from)
and `CorpusConfig` (passages, store, index, searcher), plus its own section below.
The step's own settings (k, lengths, retriever training) are `step.StepConfig`, the
optimisers' are `reader/OptimizerConfig` and `retriever/OptimizerConfig`.
An empty string means "not given".
"""

from dataclasses import dataclass

import gin

from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import is_remote

# What lies in a run's model_dir, beside metrics.METRICS_FILE and tensorboard/.
CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.gin"
FINAL = "final"  # the model folder
INDEX = "index"  # embeddings that the run made, one folder a version
FINAL_INDEX = "final_index"  # by the passage tower of FINAL, if the index was refreshed
PREDICTIONS = "predictions"

SEARCHERS = ("exact", "scann")
READER_INITS = ("random", "induction")
DTYPES = ("float32", "bfloat16")
INDEX_DTYPES = (*DTYPES, "int8")
PASSAGE_SOURCES = ("index", "file", "none")


def _require(condition: bool, binding: str, value: object, expected: str) -> None:
    """Raise a UserError that names the gin binding at fault."""
    if not condition:
        raise UserError(f"{binding} = {value!r}: expected {expected}")


def _one_of(choices: tuple[str, ...]) -> str:
    return f"one of {', '.join(map(repr, choices))}"


@gin.configurable
@dataclass(frozen=True)
class ModelConfig:
    """Where the two models and their tokenizers come from.

    reader, retriever: model folders (a run writes one at its end; the two may be the same
        folder). Architecture, parameters and tokenizer are taken from it; explicit
        bindings of ReaderConfig or RetrieverConfig (dropout, dtype, scan, remat) override
        its fields. "" = random parameters, architecture from gin alone.
    reader_tokenizer, retriever_tokenizer: `tokenizer.json` files, needed for (and only
        for) a model that starts from random parameters.
    reader_init: how a reader without a folder begins: 'random', or 'induction' with the
        copying circuit wired in (see reader/induction.py).
    export_dtype: 'float32' or 'bfloat16', how a run's final model folder is written.
    optimizer_state: train on from the optimiser state that `convert` put into the folders; a
        part whose folder has none begins anew.
    """

    reader: str = ""
    retriever: str = ""
    reader_tokenizer: str = ""
    retriever_tokenizer: str = ""
    reader_init: str = "random"
    export_dtype: str = "float32"
    optimizer_state: bool = False

    def __post_init__(self) -> None:
        _require(
            self.reader_init in READER_INITS,
            "ModelConfig.reader_init",
            self.reader_init,
            _one_of(READER_INITS),
        )
        _require(
            self.export_dtype in DTYPES,
            "ModelConfig.export_dtype",
            self.export_dtype,
            _one_of(DTYPES),
        )
        for model in ("reader", "retriever"):
            folder, tokenizer = getattr(self, model), getattr(self, f"{model}_tokenizer")
            _require(
                not (folder and tokenizer),
                f"ModelConfig.{model}_tokenizer",
                tokenizer,
                f"nothing, since ModelConfig.{model} = {folder!r} brings its own tokenizer",
            )


@gin.configurable
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
    """

    passages: str = ""
    store: str = ""
    index: str = ""
    searcher: str = "exact"
    recall_target: float = 1.0
    embed_batch_size: int = 256
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for field in ("store", "index"):
            path = getattr(self, field)
            _require(
                not is_remote(path),
                f"CorpusConfig.{field}",
                path,
                "a folder on a disk, since it is memory-mapped; to read it, mount the bucket (as "
                "tpu_scripts/setup.sh --bucket NAME does at /mnt/NAME) and bind the path there; "
                "build it on a disk and copy it",
            )
        _require(
            self.searcher in SEARCHERS,
            "CorpusConfig.searcher",
            self.searcher,
            _one_of(SEARCHERS),
        )
        _require(
            0 < self.recall_target <= 1,
            "CorpusConfig.recall_target",
            self.recall_target,
            "more than 0 and at most 1",
        )
        _require(
            self.embed_batch_size > 0,
            "CorpusConfig.embed_batch_size",
            self.embed_batch_size,
            "a positive number",
        )
        _require(
            self.dtype in INDEX_DTYPES, "CorpusConfig.dtype", self.dtype, _one_of(INDEX_DTYPES)
        )
        _require(
            self.dtype != "int8" or self.searcher == "exact",
            "CorpusConfig.dtype",
            self.dtype,
            "'float32' or 'bfloat16' with CorpusConfig.searcher = 'scann', which compresses by "
            "itself",
        )


@gin.configurable
@dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints (0 = only after the last step); keep: how many stay."""

    every: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        _require(self.every >= 0, "CheckpointConfig.every", self.every, "0 or more")
        _require(self.keep >= 1, "CheckpointConfig.keep", self.keep, "1 or more")


@gin.configurable
@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    model_dir: where checkpoints, metrics, the final config and `final/` (the model folder)
        go; a run started again in the same directory goes on from its last checkpoint.
    task, file: the task's name and its training file.
    passages: 'index' (retrieve), 'file' (given in the data file), 'none' (closed book).
    total_steps: training ends after this step.
    seed: initial parameters, data order and dropout all follow from it.
    log_every: steps between two lines of metrics.
    eval_every: steps between evaluations on `EvalConfig.file` (0 = only after the last step).

    When the index is refreshed is the business of RefreshPolicy and StalenessConfig.
    """

    model_dir: str
    file: str
    total_steps: int
    task: str = "qa"
    passages: str = "index"
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0

    def __post_init__(self) -> None:
        _require(bool(self.model_dir), "TrainConfig.model_dir", self.model_dir, "a directory")
        _require(bool(self.file), "TrainConfig.file", self.file, "a data file")
        _require(self.total_steps > 0, "TrainConfig.total_steps", self.total_steps, "1 or more")
        _require(self.log_every > 0, "TrainConfig.log_every", self.log_every, "1 or more")
        _require(self.eval_every >= 0, "TrainConfig.eval_every", self.eval_every, "0 or more")
        _require(
            self.passages in PASSAGE_SOURCES,
            "TrainConfig.passages",
            self.passages,
            _one_of(PASSAGE_SOURCES),
        )


@gin.configurable
@dataclass(frozen=True)
class EvalConfig:
    """One evaluation.

    file: data file; "" = no evaluation during training (evaluate requires it).
    task, passages: as in TrainConfig.
    k: passages that the reader reads; 0 = as many as in training, StepConfig.k.
    batch_size: rows per compiled call; the last batch is padded to it.
    generate: False = retrieve only (no answers are written, only retrieval is scored).
    recall_at: the k of recall@k; the largest one decides how many passages are searched.
        Those beyond the corpus are left out.
    predictions: jsonl file for answers with their passages and scores; "" = none from
        evaluate (a training run always writes its own into model_dir).
    max_rows: evaluate only this many rows from the top of the file (0 = all).
    explain: say for each passage that was read what it did for the answer, in the
        predictions; costs two more decoder passes a passage.
    """

    file: str = ""
    task: str = "qa"
    passages: str = "index"
    k: int = 0
    batch_size: int = 16
    generate: bool = True
    recall_at: tuple[int, ...] = (1, 5, 20)
    predictions: str = ""
    max_rows: int = 0
    explain: bool = False

    def __post_init__(self) -> None:
        _require(
            not self.explain or (self.generate and self.passages != "none"),
            "EvalConfig.explain",
            self.explain,
            "False where nothing is read (EvalConfig.generate, EvalConfig.passages)",
        )
        _require(self.k >= 0, "EvalConfig.k", self.k, "0 or more")
        _require(self.batch_size > 0, "EvalConfig.batch_size", self.batch_size, "1 or more")
        _require(self.max_rows >= 0, "EvalConfig.max_rows", self.max_rows, "0 or more")
        _require(
            all(k > 0 for k in self.recall_at), "EvalConfig.recall_at", self.recall_at, "k >= 1"
        )
        _require(
            self.passages in PASSAGE_SOURCES,
            "EvalConfig.passages",
            self.passages,
            _one_of(PASSAGE_SOURCES),
        )


@gin.configurable
@dataclass(frozen=True)
class RetrieverTrainConfig:
    """One run of contrastive pretraining, on the passages of `CorpusConfig`.

    model_dir: as in TrainConfig; `final/` holds the retriever alone.
    total_steps: training ends after this step.
    batch_size: pairs per step.
    task, file: a task whose queries are paired with their gold passage, such as `cloze` on
        the passages themselves; "" = each pair is two crops of one passage.
    group: so many neighbouring records of the file stay in one batch, as hard negatives
        of each other (passages of one title, say); divides batch_size.
    hard_negatives: so many of a record's `negatives` are drawn as hard negatives of its query
        (RetrieveConfig.negatives writes such records); needs a task.
    seed: initial parameters, data order, crops and dropout all follow from it.
    log_every: steps between two lines of metrics.
    """

    model_dir: str
    total_steps: int
    batch_size: int = 64
    task: str = ""
    file: str = ""
    group: int = 1
    hard_negatives: int = 0
    seed: int = 0
    log_every: int = 50

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the binding."""
        name = "RetrieverTrainConfig"
        _require(bool(self.model_dir), f"{name}.model_dir", self.model_dir, "a directory")
        for field in ("total_steps", "batch_size", "group", "log_every"):
            _require(getattr(self, field) > 0, f"{name}.{field}", getattr(self, field), "1 or more")
        _require(
            self.batch_size % self.group == 0,
            f"{name}.group",
            self.group,
            f"a divisor of {name}.batch_size = {self.batch_size}",
        )
        _require(
            self.hard_negatives == 0 or (self.hard_negatives > 0 and bool(self.task)),
            f"{name}.hard_negatives",
            self.hard_negatives,
            "0, or more with a task",
        )
        _require(bool(self.task) == bool(self.file), f"{name}.file", self.file, "given with a task")


@gin.configurable
@dataclass(frozen=True)
class RetrieveConfig:
    """What `retrieve` writes.

    file, task: questions; queries are formed as the task does it for the retriever.
    output: jsonl file, one row per question with its passages and scores.
    k: passages per question.
    rerank: 0, or more than k: search so many and keep the k best by their fresh embeddings, for
        an int8 index.
    negatives: up to so many of the found passages that are not gold and have no accepted
        answer in them become the row's `negatives`, best first, to train a retriever against.
    batch_size: questions per compiled call.
    """

    file: str
    output: str
    task: str = "qa"
    k: int = 20
    rerank: int = 0
    negatives: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the binding."""
        _require(bool(self.file), "RetrieveConfig.file", self.file, "a data file")
        _require(bool(self.output), "RetrieveConfig.output", self.output, "a jsonl file")
        _require(self.k > 0, "RetrieveConfig.k", self.k, "1 or more")
        _require(
            self.rerank == 0 or self.rerank > self.k,
            "RetrieveConfig.rerank",
            self.rerank,
            f"0, or more than RetrieveConfig.k = {self.k}",
        )
        _require(
            0 <= self.negatives <= self.k, "RetrieveConfig.negatives", self.negatives, "from 0 to k"
        )
        _require(self.batch_size > 0, "RetrieveConfig.batch_size", self.batch_size, "1 or more")
