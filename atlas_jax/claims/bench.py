"""Make the steps of rows: corpora, lessons, 64-shot training, and questions to a trained model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from atlas_jax.claims.data import Data
from atlas_jax.claims.steps import Made, Step, Value
from atlas_jax.demo import factbook
from atlas_jax.training.config import FINAL, FINAL_INDEX

FACTBOOK, SQUAD = "factbook", "squad_open"  # folders of --data
Bindings = dict[str, Value]

CLOSED_BOOK: Bindings = {
    "TrainConfig.passages": "none",
    "EvalConfig.passages": "none",
    "RETRIEVER_TRAINING": "fixed",
}
# Half of the demo's lesson, since twenty readers are taught: one for each seed and each beginning.
LESSON_STEPS = 180
# As in runs/demo_task.gin after a lesson, but with all kinds of retriever training. The reader
# takes small steps and answers from one passage (`k` is larger).
TAUGHT: Bindings = {"READER_LEARNING_RATE": 1e-4, "EvalConfig.k": 1}
# For prose, not lists of fields: the retriever reads the text itself.
SQUAD_READING: Bindings = {
    "PASSAGE_LENGTH": 192,
    "RETRIEVER_LENGTH": 128,
    "StoreConfig.retriever_format": "{title} {text}",
}
PRETEXT_STEPS = 40
# The rates of the recipe table. Batch and length are small enough for a minute on a laptop.
PRETRAINING: Bindings = {
    "RETRIEVER_TRAINING": "joint",
    "REFRESH": str(PRETEXT_STEPS // 2),
    "TRAIN_STEPS": PRETEXT_STEPS,
    "WARMUP_STEPS": 4,
    "READER_LEARNING_RATE": 1e-4,
    "RETRIEVER_LEARNING_RATE": 1e-5,
    "EVAL_FILE": "",
}
# A passage in and a passage out would take minutes.
PRETEXT_LENGTHS: dict[str, Bindings] = {
    "mlm": {"QUERY_LENGTH": 128, "TARGET_LENGTH": 48},
    "lm": {"QUERY_LENGTH": 96, "TARGET_LENGTH": 48},
    "section": {"QUERY_LENGTH": 64, "TARGET_LENGTH": 48},
    "cloze": {"QUERY_LENGTH": 64},
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """Makes the steps of rows.

    Attributes:
      data: the files.
      checkpoint: the model folder that every row begins with.
    """

    data: Data
    checkpoint: Path

    def corpus(self, passages: Path | Made, reading: Bindings | None = None) -> Bindings:
        """Bindings STORE and INDEX of a corpus, indexed with the checkpoint's retriever."""
        step = Step(
            "build_index",
            ("runs/build_index.gin", "corpora/factbook.gin"),
            {
                "INITIAL_CHECKPOINT_PATH": self.checkpoint,
                "PASSAGES": passages,
                "STORE": Made("store"),
                "INDEX": Made("index"),
                **(reading or {}),
            },
        )
        return {"STORE": Made("store", step), "INDEX": Made("index", step), **(reading or {})}

    def train(self, seed: int, bindings: Bindings, *files: str) -> Step:
        """Training as in runs/demo_64shot.gin, from the checkpoint or what `bindings` name."""
        start: Bindings = {
            "MODEL_DIR": Made("."),
            "INITIAL_CHECKPOINT_PATH": self.checkpoint,
            "TrainConfig.seed": seed,
            "EvalConfig.recall_at": (1, 5, 20),
        }
        return Step("train", ("runs/demo_64shot.gin", *files), {**start, **bindings})

    def taught(
        self, seed: int, questions: Path, passages: Path, bindings: Bindings | None = None
    ) -> Bindings:
        """Bindings to begin with a reader that the task's questions have already taught.

        The lesson is runs/demo_read.gin; the retriever is not changed.
        """
        lesson = Step(
            "train",
            ("runs/demo_read.gin",),
            {
                "MODEL_DIR": Made("."),
                "INITIAL_CHECKPOINT_PATH": self.checkpoint,
                "QUESTION_FILE": questions,
                "TRAIN_FILE": passages,
                "TRAIN_STEPS": LESSON_STEPS,
                "TrainConfig.seed": seed,
                **(bindings or {}),
            },
        )
        return {"INITIAL_CHECKPOINT_PATH": Made(FINAL, lesson), **TAUGHT}

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
        return self.train(
            seed,
            {
                **self.corpus(self.data.factbook("passages.jsonl")),
                **self.taught(seed, questions, passages, before),
                "TRAIN_FILE": questions,
                "EVAL_FILE": self.data.sample(self.data.factbook("test.jsonl")),
                **(bindings or {}),
            },
            *files,
        )

    def squad(self, seed: int, bindings: Bindings | None = None) -> Step:
        """64 questions about SQuAD's paragraphs."""
        return self.train(
            seed,
            {
                **self.corpus(self.data.of(f"{SQUAD}/passages.jsonl"), SQUAD_READING),
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
                **PRETRAINING,
                **PRETEXT_LENGTHS[task],
            },
            f"tasks/{task}.gin",
        )
        return self.questions(
            seed,
            {"INDEX": Made(FINAL_INDEX, pretext)},
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
        reading = {
            name: trained.bindings[name] for name in SQUAD_READING if name in trained.bindings
        }
        return self.evaluate(trained, self.corpus(Made("clean.jsonl", clean), reading))

    def edition(
        self, seed: int, edition: str, other: str, bindings: Bindings | None = None
    ) -> Step:
        """64 questions with the answers of one edition of the Factbook, over its index."""
        train = self.data.of(f"{FACTBOOK}/temporal_train.jsonl")
        drawn = self.data.few_shot(train, seed)
        test = self.data.sample(self.data.of(f"{FACTBOOK}/temporal_test.jsonl"), changed=True)
        return self.train(
            seed,
            {
                **self._edition(edition, other),
                **self.taught(
                    seed,
                    self.data.of_edition(drawn, edition),
                    self.data.about(self._passages(edition), train),
                ),
                "TRAIN_FILE": drawn,
                "EVAL_FILE": test,
                **(bindings or {}),
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
                "QUERY_LENGTH": 96,
                **(bindings or {}),
            },
            "tasks/multiple_choice.gin",
        )


MakeStep = Callable[[Bench, int], Step]
