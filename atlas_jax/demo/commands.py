"""The demo's folders, and the command line of each of its runs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from atlas_jax import from_gin
from atlas_jax.answering.batcher import DataConfig
from atlas_jax.answering.config import EvalConfig
from atlas_jax.demo import factbook
from atlas_jax.demo.bm25 import RECALL_AT
from atlas_jax.demo.paths import bind
from atlas_jax.training.config import FINAL, StepConfig

READ = "64 questions teach the reader to read"
FIND = "64 questions teach the retriever to find"
CLOSED = "64 questions, closed book"
FIXED = "64 questions, fixed retriever"
TAUGHT = "64 questions, taught retriever, fixed"
JOINT = "64 questions, retriever trained along"

# The differences between the four runs; all else is in runs/demo_task.gin.
MODES = {
    CLOSED: (
        '--gin.TrainConfig.passages="none"',
        '--gin.EvalConfig.passages="none"',
        "--gin.RETRIEVER_TRAINING=fixed",
        "--gin.TRAIN_STEPS=60",  # this reader has not been taught before
        "--gin.READER_LEARNING_RATE=5e-4",
    ),
    FIXED: ("--gin.RETRIEVER_TRAINING=fixed",),
    TAUGHT: ("--gin.RETRIEVER_TRAINING=fixed",),
    JOINT: (),
}
ROW_NAMES = {
    CLOSED: "closed book",
    FIXED: "fixed retriever",
    TAUGHT: "taught retriever",
    JOINT: "jointly trained",
}
_BEGIN_TAUGHT = (TAUGHT, JOINT)  # with the retriever of FIND, not with the shipped one


@dataclasses.dataclass(frozen=True)
class Place:
    """The folders of one demo run.

    Attributes:
      out: folder for all results of the run.
      checkpoint: the model folder that the run begins with.
      store: the passage store.
      index: the index by the shipped retriever; `taught_index` is by the taught one.
    """

    out: Path
    checkpoint: Path
    store: Path
    index: Path
    taught_index: Path

    @classmethod
    def under(cls, out: Path, checkpoint: Path) -> "Place":
        """The usual folders of a run in `out`."""
        return cls(out, checkpoint, out / "store", out / "index", out / "taught_index")

    @property
    def data(self) -> Path:
        """Passages and questions."""
        return self.out / "data"

    def model_dir(self, mode: str) -> Path:
        """The folder of one training run."""
        names = {**ROW_NAMES, READ: "read", FIND: "find"}
        return self.out / names[mode].replace(" ", "_")

    def reader(self, mode: str) -> Path:
        """The folder with the run's first reader; it is untaught if the run does not read."""
        return self.checkpoint if mode == CLOSED else self.model_dir(READ) / FINAL

    def retriever(self, mode: str) -> Path:
        """The folder with the run's first retriever."""
        return self.model_dir(FIND) / FINAL if mode in _BEGIN_TAUGHT else self.checkpoint

    def index_of(self, mode: str) -> Path:
        """The index of that retriever."""
        return self.taught_index if mode in _BEGIN_TAUGHT else self.index


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How many passages an answer is read from, and at what lengths in tokens."""

    k: int
    text_length: int
    query_length: int

    @classmethod
    def of_last_run(cls) -> "Lengths":
        """The lengths of the last run, whose configuration gin still holds."""
        step = from_gin.told(StepConfig)
        k = from_gin.told(EvalConfig).k or step.k
        return cls(k, step.reader_length, from_gin.told(DataConfig).query_length)


def index(place: Place, mode: str) -> list[str]:
    """Index the corpus with the retriever that this run begins with."""
    return [
        "--gin_file=runs/build_index.gin",
        "--gin_file=corpora/factbook.gin",
        bind("INITIAL_CHECKPOINT_PATH", place.checkpoint),
        bind("ModelConfig.retriever", place.retriever(mode)),
        bind("PASSAGES", place.data / "passages.jsonl"),
        *_corpus(place, mode),
    ]


def teach(place: Place, stage: str, seed: int) -> list[str]:
    """Teach the questions' wording to the reader (READ) or to the retriever (FIND)."""
    file, config = {
        READ: ("demo_read", "TrainConfig"),
        FIND: ("demo_find", "RetrieverTrainConfig"),
    }[stage]
    return [
        f"--gin_file=runs/{file}.gin",
        bind("MODEL_DIR", place.model_dir(stage)),
        bind("INITIAL_CHECKPOINT_PATH", place.checkpoint),
        bind("STORE", place.store),
        bind("QUESTION_FILE", place.data / factbook.few_shot_name(seed)),
        bind("TRAIN_FILE", place.data / "passages_pretraining.jsonl"),
        f"--gin.{config}.seed={seed}",
    ]


def train_task(place: Place, mode: str, seed: int, bindings: Sequence[str]) -> list[str]:
    """Train and evaluate the whole task in one of the four ways."""
    return [
        "--gin_file=runs/demo_task.gin",
        bind("MODEL_DIR", place.model_dir(mode)),
        bind("INITIAL_CHECKPOINT_PATH", place.reader(mode)),
        bind("ModelConfig.retriever", place.retriever(mode)),
        *_corpus(place, mode),
        bind("TRAIN_FILE", place.data / factbook.few_shot_name(seed)),
        bind("EVAL_FILE", place.data / "test.jsonl"),
        f"--gin.EvalConfig.recall_at={RECALL_AT}",
        f"--gin.TrainConfig.seed={seed}",
        *MODES[mode],
        *bindings,
    ]


def untrained(place: Place, predictions: Path) -> list[str]:
    """Evaluate what the shipped retriever finds."""
    return [
        "--gin_file=runs/evaluate.gin",
        bind("INITIAL_CHECKPOINT_PATH", place.checkpoint),
        *_corpus(place, FIXED),
        bind("EVAL_FILE", place.data / "test.jsonl"),
        bind("PREDICTIONS", predictions),
        "--gin.EvalConfig.generate=False",
        f"--gin.EvalConfig.recall_at={RECALL_AT}",
    ]


def replace(place: Place, passages: Path) -> list[str]:
    """Give some passages another text, in the store and in the trained model's index."""
    return [
        "replace",
        str(passages),
        f"--model={place.model_dir(JOINT) / FINAL}",
        f"--store={place.store}",
        f"--index={place.index_of(JOINT)}",
    ]


def ask_again(place: Place, reading: Lengths, questions: Path, answers: Path) -> list[str]:
    """The trained model, reading as it was trained to."""
    return [
        "--gin_file=runs/evaluate.gin",
        bind("INITIAL_CHECKPOINT_PATH", place.model_dir(JOINT) / FINAL),
        *_corpus(place, JOINT),
        bind("EVAL_FILE", questions),
        bind("PREDICTIONS", answers),
        f"--gin.K={reading.k}",
        f"--gin.TEXT_LENGTH={reading.text_length}",
        f"--gin.QUERY_LENGTH={reading.query_length}",
    ]


def _corpus(place: Place, mode: str) -> list[str]:
    return [bind("STORE", place.store), bind("INDEX", place.index_of(mode))]
