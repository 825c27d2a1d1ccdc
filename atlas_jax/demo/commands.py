"""The demo's folders, and the command line of each of its runs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from atlas_jax.demo.bm25 import RECALL_AT
from atlas_jax.demo.corpora import Asked
from atlas_jax.demo.paths import bind
from atlas_jax.demo.recipes import CLOSED, FIXED, JOINT, TAUGHT, Recipe
from atlas_jax.training.config import FINAL

READ = "the words of 64 questions teach the reader to read"
FIND = "the words of 64 questions teach the retriever to find"

ROW_NAMES = {
    CLOSED: "closed book",
    FIXED: "fixed retriever",
    TAUGHT: "taught retriever",
    JOINT: "jointly trained",
}
_BEGIN_TAUGHT = (TAUGHT, JOINT)  # with the retriever of FIND, if the recipe has this lesson


@dataclasses.dataclass(frozen=True)
class Place:
    """The folders of one demo run.

    Attributes:
      out: folder for all results of the run.
      checkpoint: the model folder that the run begins with.
    """

    out: Path
    checkpoint: Path

    @property
    def data(self) -> Path:
        """Passages and questions."""
        return self.out / "data"

    @property
    def store(self) -> Path:
        """The passage store."""
        return self.out / "store"

    @property
    def index(self) -> Path:
        """The index by the retriever that the run begins with."""
        return self.out / "index"

    @property
    def taught_index(self) -> Path:
        """The index by the retriever that a lesson taught; missing where none did."""
        return self.out / "taught_index"

    @property
    def states(self) -> Path:
        """What the reader keeps of the passages; missing where it keeps nothing."""
        return self.out / "reader_states"

    def model_dir(self, mode: str) -> Path:
        """The folder of one training run."""
        names = {**ROW_NAMES, READ: "read", FIND: "find"}
        return self.out / names[mode].replace(" ", "_")

    def trained(self, mode: str) -> Path:
        """The model that this run ended with."""
        return self.model_dir(mode) / FINAL

    def index_of(self, mode: str) -> Path:
        """The index of the retriever that this run begins with."""
        taught = mode in _BEGIN_TAUGHT and self.taught_index.exists()
        return self.taught_index if taught else self.index


@dataclasses.dataclass(frozen=True)
class Commands:
    """The arguments of each command of one demo run."""

    place: Place
    recipe: Recipe
    asked: Asked
    seed: int

    def index(self, mode: str) -> list[str]:
        """Index the corpus with the retriever that this run begins with."""
        folder = self.place.taught_index if mode in _BEGIN_TAUGHT else self.place.index
        return [
            "--gin_file=runs/build_index.gin",
            f"--gin_file={self.recipe.corpus}",
            bind("INITIAL_CHECKPOINT_PATH", self.place.checkpoint),
            bind("ModelConfig.retriever", self._retriever(mode)),
            bind("PASSAGES", self.asked.passages),
            bind("STORE", self.place.store),
            bind("INDEX", folder),
            *(f"--gin.{name}={value}" for name, value in self.recipe.embedding.items()),
        ]

    def teach(self, stage: str) -> list[str]:
        """Teach the questions' wording to the reader (READ) or to the retriever (FIND)."""
        file, config = {
            READ: (self.recipe.lesson, "TrainConfig"),
            FIND: (self.recipe.find, "RetrieverTrainConfig"),
        }[stage]
        assert self.asked.lesson is not None
        return [
            f"--gin_file=runs/{file}.gin",
            bind("MODEL_DIR", self.place.model_dir(stage)),
            bind("INITIAL_CHECKPOINT_PATH", self.place.checkpoint),
            bind("STORE", self.place.store),
            bind("QUESTION_FILE", self.asked.few),
            bind("TRAIN_FILE", self.asked.lesson),
            f"--gin.{config}.seed={self.seed}",
        ]

    def train(self, mode: str, bindings: Sequence[str]) -> list[str]:
        """Train on the questions in one of the recipe's ways."""
        closed = ('--gin.TrainConfig.passages="none"', *self.recipe.closed_book)
        file, data = self.recipe.task, [bind("TRAIN_FILE", self.asked.few)]
        if self.recipe.titles and self.asked.lesson is not None and mode != CLOSED:
            file = self.recipe.titles
            data = [
                bind("TRAIN_FILE", self.asked.lesson),
                bind("QUESTION_FILE", self.asked.few),
            ]
        return [
            f"--gin_file=runs/{file}.gin",
            bind("MODEL_DIR", self.place.model_dir(mode)),
            bind("INITIAL_CHECKPOINT_PATH", self._reader(mode)),
            bind("ModelConfig.retriever", self._retriever(mode)),
            *self._corpus(mode),
            *data,
            f"--gin.TrainConfig.seed={self.seed}",
            *(() if mode == JOINT else ("--gin.RETRIEVER_TRAINING=fixed",)),
            *(closed if mode == CLOSED else ()),
            *bindings,
        ]

    def ask(
        self, mode: str, k: int, questions: Path, predictions: Path, changed: bool = False
    ) -> list[str]:
        """Ask the model that this run ended with, reading k passages; 0 = closed book.

        Args:
          changed: passages were replaced, so what is kept of them does not count.
        """
        return [
            "--gin_file=runs/evaluate.gin",
            bind("INITIAL_CHECKPOINT_PATH", self.place.trained(mode)),
            *(self._index(mode) if changed else self._corpus(mode)),
            bind("EVAL_FILE", questions),
            bind("PREDICTIONS", predictions),
            "--gin.EvalConfig.loss='none'",
            *((f"--gin.K={k}", self._recall) if k else ('--gin.EvalConfig.passages="none"',)),
        ]

    def replace(self, passages: Path) -> list[str]:
        """Give some passages another text, in the store and in the trained model's index."""
        return [
            "replace",
            str(passages),
            f"--model={self.place.trained(JOINT)}",
            f"--store={self.place.store}",
            f"--index={self.place.index_of(JOINT)}",
        ]

    def untrained(self, predictions: Path) -> list[str]:
        """Evaluate what the shipped retriever finds."""
        return [
            "--gin_file=runs/evaluate.gin",
            bind("INITIAL_CHECKPOINT_PATH", self.place.checkpoint),
            *self._index(FIXED),
            bind("EVAL_FILE", self.asked.asked),
            bind("PREDICTIONS", predictions),
            "--gin.EvalConfig.generate=False",
            self._recall,
        ]

    @property
    def _recall(self) -> str:
        return f"--gin.EvalConfig.recall_at={RECALL_AT}"

    def _index(self, mode: str) -> list[str]:
        place = self.place
        return [bind("STORE", place.store), bind("INDEX", place.index_of(mode))]

    def _corpus(self, mode: str) -> list[str]:
        states = bind("CorpusConfig.reader_states", self.place.states)
        kept = [states] if self.recipe.states else []
        return [*self._index(mode), *kept]

    def _reader(self, mode: str) -> Path:
        """The folder with the run's first reader; one that answers by heart is not taught."""
        taught = self.place.trained(READ)
        return taught if mode != CLOSED and taught.exists() else self.place.checkpoint

    def _retriever(self, mode: str) -> Path:
        taught = self.place.trained(FIND)
        return taught if mode in _BEGIN_TAUGHT and taught.exists() else self.place.checkpoint
