"""Make the steps of rows: corpora, lessons, 64-shot training, and questions to a trained model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from atlas_jax.claims.data import Data
from atlas_jax.claims.pairs import Bindings, Pair
from atlas_jax.claims.steps import Made, Step
from atlas_jax.demo import factbook
from atlas_jax.training.config import FINAL, FINAL_INDEX

FACTBOOK, SQUAD = "factbook", "squad_open"  # folders of --data
CLOSED_BOOK: Bindings = {
    "TrainConfig.passages": "none",
    "EvalConfig.passages": "none",
    "RETRIEVER_TRAINING": "fixed",
}
STATES = "CorpusConfig.reader_states"


@dataclasses.dataclass(frozen=True)
class Bench:
    """Makes the steps of rows.

    Attributes:
      data: the files.
      checkpoint: the model folder that every row begins with.
      pair: how it is taught.
    """

    data: Data
    checkpoint: Path
    pair: Pair

    def corpus(
        self, passages: Path | Made, reading: Bindings | None = None, states: bool = True
    ) -> Bindings:
        """Bindings of a corpus, indexed with the checkpoint's retriever.

        Args:
          reading: bindings that say how the passages are read.
          states: whether runs keep what the reader computes of a passage alone, if the pair does.
            It takes as long as reading every passage once.
        """
        recipe = self.pair.recipe
        step = Step(
            "build_index",
            ("runs/build_index.gin", recipe.corpus),
            {
                "INITIAL_CHECKPOINT_PATH": self.checkpoint,
                "PASSAGES": passages,
                "STORE": Made("store"),
                "INDEX": Made("index"),
                **recipe.embedding,
                **(reading or {}),
            },
        )
        kept: Bindings = {}
        if recipe.states:
            kept = {STATES: Made("reader_states", step) if states else ""}
        found = {name: Made(name.lower(), step) for name in ("STORE", "INDEX")}
        return {**found, **kept, **(reading or {})}

    def train(self, seed: int, bindings: Bindings, *files: str, run: str = "") -> Step:
        """Training on a row's questions, from the checkpoint or what `bindings` name.

        Args:
          run: gin file of runs/; "" = the pair's `task`.
        """
        start: Bindings = {
            "MODEL_DIR": Made("."),
            "INITIAL_CHECKPOINT_PATH": self.checkpoint,
            "TrainConfig.seed": seed,
            "EvalConfig.recall_at": (1, 5, 20),
        }
        return Step("train", (f"runs/{run or self.pair.task}.gin", *files), {**start, **bindings})

    def taught(
        self, seed: int, questions: Path, passages: Path, bindings: Bindings | None = None
    ) -> Bindings:
        """Bindings to begin with a reader that the task's questions have already taught.

        The lesson is the recipe's; the retriever is not changed.
        """
        lesson = Step(
            "train",
            (f"runs/{self.pair.recipe.lesson}.gin",),
            {
                "MODEL_DIR": Made("."),
                "INITIAL_CHECKPOINT_PATH": self.checkpoint,
                "QUESTION_FILE": questions,
                "TRAIN_FILE": passages,
                "TrainConfig.seed": seed,
                **self.pair.lesson,
                **(bindings or {}),
            },
        )
        return {"INITIAL_CHECKPOINT_PATH": Made(FINAL, lesson), **self.pair.taught}

    def evaluate(self, trained: Step, bindings: Bindings) -> Step:
        """Ask a trained model again, in its own configuration but for `bindings`."""
        start: Bindings = {
            "INITIAL_CHECKPOINT_PATH": Made(FINAL, trained),
            "EvalConfig.predictions": Made("predictions.jsonl"),
        }
        return trained.again("evaluate", {**start, **bindings})

    def questions(
        self,
        seed: int,
        bindings: Bindings | None = None,
        *files: str,
        before: Bindings | None = None,
    ) -> Step:
        """64 questions about the Factbook that the package brings, the lesson first.

        Args:
          before: bindings of the lesson that differ, such as its checkpoint.
        """
        questions = self.data.factbook(factbook.few_shot_name(seed))
        passages = self.data.factbook("passages_pretraining.jsonl")
        asked: Bindings = {
            **self.corpus(self.data.factbook("passages.jsonl")),
            "EVAL_FILE": self.data.sample(self.data.factbook("test.jsonl")),
        }
        own, run = bindings or {}, ""
        learnt: Bindings = {"TRAIN_FILE": questions}
        if not self._by_heart(own):
            asked |= self.taught(seed, questions, passages, before)
            run = self.pair.recipe.titles
        if run:
            learnt = {
                "TRAIN_FILE": passages,
                "QUESTION_FILE": questions,
                "EvalConfig.task": "qa",
            }
        return self.train(seed, {**asked, **learnt, **own}, *files, run=run)

    def _by_heart(self, bindings: Bindings) -> bool:
        """Whether a row is closed book and has no lesson before it."""
        closed = bindings.get("TrainConfig.passages") == "none"
        return closed and not self.pair.closed_lesson

    def squad(self, seed: int, bindings: Bindings | None = None) -> Step:
        """64 questions about SQuAD's paragraphs."""
        return self.train(
            seed,
            {
                **self.corpus(
                    self.data.of(f"{SQUAD}/passages.jsonl"), self.pair.prose, states=False
                ),
                "TRAIN_FILE": self.data.findable(self.data.of(f"{SQUAD}/train.jsonl"), seed),
                "EVAL_FILE": self.data.sample(self.data.of(f"{SQUAD}/test.jsonl")),
                **(bindings or {}),
            },
        )

    def pretrained(self, seed: int, task: str) -> Step:
        """64 questions after a short joint pretraining with a pretext task."""
        passages = self.data.factbook("passages.jsonl")
        pretext = self.train(
            seed,
            {
                **self.corpus(passages),
                "TRAIN_FILE": self.data.factbook("passages_pretraining.jsonl"),
                **self.pair.pretraining(task),
            },
            f"tasks/{task}.gin",
        )
        return self.questions(
            seed,
            {"INDEX": Made(FINAL_INDEX, pretext)} if self.pair.joint else {},
            before={"INITIAL_CHECKPOINT_PATH": Made(FINAL, pretext)},
        )

    def without_leaks(self, trained: Step, passages: Path, ngram: int) -> Step:
        """Ask a trained model again, without the passages that share words with the questions."""
        clean = Step(
            "remove_leaks",
            ("runs/remove_leaks.gin",),
            {
                "PASSAGES": passages,
                "EVAL_FILE": trained.bindings["EVAL_FILE"],
                "OUTPUT": Made("clean.jsonl"),
                "REPORT": Made("leaks.jsonl"),
                "NGRAM": ngram,
            },
        )
        prose = self.pair.prose
        reading = {name: trained.bindings[name] for name in prose if name in trained.bindings}
        return self.evaluate(
            trained, self.corpus(Made("clean.jsonl", clean), reading, states=False)
        )

    def reworded(self, trained: Step) -> Step:
        """Ask a model of the Factbook again, in words that no question file has."""
        test = self.data.reworded(self.data.factbook("test.jsonl"))
        return self.evaluate(trained, {"EVAL_FILE": self.data.sample(test)})

    def cut_again(self, trained: Step) -> Step:
        """Ask a model of the Factbook again, over passages that are cut another way."""
        passages, test = self.data.cut_again(
            self.data.factbook("passages.jsonl"), self.data.factbook("test.jsonl")
        )
        corpus = self.corpus(passages, states=False)
        return self.evaluate(trained, {**corpus, "EVAL_FILE": self.data.sample(test)})

    def edition(
        self, seed: int, edition: str, other: str, bindings: Bindings | None = None
    ) -> Step:
        """64 questions with the answers of one edition of the Factbook, over its index."""
        train = self.data.of(f"{FACTBOOK}/temporal_train.jsonl")
        drawn = self.data.few_shot(train, seed)
        test = self.data.sample(self.data.of(f"{FACTBOOK}/temporal_test.jsonl"), changed=True)
        own = bindings or {}
        lesson: Bindings = {}
        if not self._by_heart(own):
            lesson = self.taught(
                seed,
                self.data.of_edition(drawn, edition),
                self.data.about(self._passages(edition), train),
            )
        return self.train(
            seed,
            {
                **self._edition(edition, other),
                **lesson,
                **self.pair.short,
                "TRAIN_FILE": drawn,
                "EVAL_FILE": test,
                **own,
            },
            "tasks/temporal.gin",
        )

    def swapped(self, trained: Step, edition: str, other: str) -> Step:
        """Ask a trained model again, over another edition's index."""
        return self.evaluate(trained, self._edition(edition, other))

    def _edition(self, edition: str, other: str) -> Bindings:
        corpus = self.corpus(self._passages(edition))
        return {**corpus, "EDITION": edition, "OTHER_EDITION": other}

    def _passages(self, edition: str) -> Path:
        return self.data.of(f"{FACTBOOK}/passages_{edition}.jsonl")

    def claims(self, seed: int, count: int, bindings: Bindings | None = None) -> Step:
        """This many claims about the Factbook; the likelihood of the answer words decides."""
        train = self.data.of(f"{FACTBOOK}/claims_train.jsonl")
        return self.train(
            seed,
            {
                **self.corpus(self._passages("2026")),
                "TRAIN_FILE": self.data.labelled(train, count, seed),
                "EVAL_FILE": self.data.sample(self.data.of(f"{FACTBOOK}/claims_test.jsonl")),
                "FeverTask.answer_by": "likelihood",
                **self.pair.short,
                **(bindings or {}),
            },
            "tasks/fever.gin",
        )

    def choice(self, seed: int, bindings: Bindings | None = None) -> Step:
        """64 questions with four options, asked in all rotations of them."""
        train = self.data.of(f"{FACTBOOK}/choice_train.jsonl")
        return self.train(
            seed,
            {
                **self.corpus(self._passages("2026")),
                "TRAIN_FILE": self.data.few_shot(train, seed),
                "EVAL_FILE": self.data.sample(self.data.of(f"{FACTBOOK}/choice_test.jsonl")),
                "ORDERS": "cyclic",
                **self.pair.choice,
                **(bindings or {}),
            },
            "tasks/multiple_choice.gin",
        )


MakeStep = Callable[[Bench, int], Step]
